// A CUDA device that is not there, for a PyTorch without CUDA: its tensors say that they are on cuda:0 and lie in the
// host's memory. Every operation refuses tensors of two devices, as a GPU does, and is then done by the CPU's kernel.
//
// What it cannot show: speed, rounding, memory, and work that is still under way.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    return {data, data, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override { return getStream(kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

const at::Generator& generator() {
  static const at::Generator one = at::detail::createCPUGenerator();
  return one;
}

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // PyTorch asks for a class of this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  Generator getNewGenerator(c10::DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

bool is_here(const at::Tensor& t) {
  return t.defined() && t.device().type() == kDevice.type();
}

// The same memory as a tensor of the CPU's.
at::Tensor on_host(const at::Tensor& t) {
  if (!is_here(t)) return t;
  c10::DataPtr data(t.storage().mutable_data(), c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t{}, t.storage().nbytes(), std::move(data), c10::GetCPUAllocator(),
                       /*resizable=*/true);
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                            c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  out._set_conj(t.is_conj());
  out._set_neg(t.is_neg());
  return out;
}

// A new tensor of the CPU's, brought here.
at::Tensor brought(const at::Tensor& t) {
  if (!t.defined()) return t;
  const at::Tensor dense = t.is_non_overlapping_and_dense() ? t : t.contiguous();
  at::Tensor out =
      at::detail::empty_strided_generic(dense.sizes(), dense.strides(), &memory, kKeys, dense.scalar_type());
  if (dense.numel() != 0) std::memcpy(out.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
  return out;
}

template <class F>
c10::IValue with_tensors(const c10::IValue& value, F change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const at::Tensor& t : value.toTensorVector()) out.push_back(change(t));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const auto& t : value.toOptionalTensorVector()) {
      out.push_back(t ? std::optional<at::Tensor>(change(*t)) : std::nullopt);
    }
    return out;
  }
  return value;
}

// Operations that a GPU does with tensors of both devices.
bool may_mix(const std::string& name) {
  for (const char* one : {"aten::copy_", "aten::_copy_from", "aten::index", "aten::index_put_", "aten::index_put",
                          "aten::_index_put_impl_", "pyprune::gather"}) {
    if (name == one) return true;
  }
  return false;
}

void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  const size_t first = stack->size() - op.schema().arguments().size();
  bool here = false, there = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> given;  // on the host, here
  const auto lend = [&](const at::Tensor& t) {
    if (!is_here(t)) {
      there = there || (t.defined() && t.dim() > 0);  // a GPU takes numbers from the host
      return t;
    }
    here = true;
    given.emplace_back(on_host(t), t);
    return given.back().first;
  };
  torch::jit::Stack inner;
  for (size_t i = first; i < stack->size(); ++i) {
    const c10::IValue& value = (*stack)[i];
    if (value.isDevice()) {
      here = here || value.toDevice() == kDevice;
      inner.emplace_back(c10::Device(c10::kCPU));
    } else {
      inner.push_back(with_tensors(value, lend));
    }
  }
  TORCH_CHECK(!(here && there) || may_mix(name), "Expected all tensors to be on the same device, but found at least ",
              "two devices, cuda:0 and cpu! (in ", name, ")");
  op.callBoxed(inner);
  const auto take_back = [&](const at::Tensor& t) {
    for (const auto& [lent, original] : given) {
      if (!t.is_same(lent)) continue;
      if (lent.sizes() != original.sizes()) {  // an output that had another size
        original.resize_(lent.sizes());
        on_host(original).copy_(lent);
      }
      return original;
    }
    return here ? brought(t) : t;
  };
  torch::jit::drop(*stack, stack->size() - first);
  for (const c10::IValue& value : inner) stack->push_back(with_tensors(value, take_back));
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const at::ScalarType type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(size, &memory, kKeys, type, format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const at::ScalarType type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type);
}

at::Tensor strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                   std::optional<int64_t> offset) {
  at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                            self.key_set(), self.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return out;
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return strided(self, size, stride, std::nullopt);
}

at::Tensor view(const at::Tensor& self, at::IntArrayRef size) {
  const at::Tensor seen = on_host(self).view(size);
  return strided(self, seen.sizes(), seen.strides(), std::nullopt);
}

at::Tensor unfold(const at::Tensor& self, int64_t dim, int64_t size, int64_t step) {
  const at::Tensor seen = on_host(self).unfold(dim, size, step);
  return strided(self, seen.sizes(), seen.strides(), std::nullopt);
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  c10::StorageImpl& storage = *self.storage().unsafeGetStorageImpl();
  if (bytes > storage.nbytes()) {
    c10::DataPtr data = memory.allocate(bytes);
    if (storage.nbytes() != 0) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  const auto packed = at::detail::defaultStrides(size);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() ? at::IntArrayRef(packed) : stride, offset);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool) {
  on_host(self).copy_(on_host(from));
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

at::Scalar item(const at::Tensor& self) {
  return on_host(self).item();
}

// A GPU counts whole numbers too.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  return brought(at::histc(on_host(self).to(at::kDouble), bins, low, high).to(self.scalar_type()));
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("copy_", &copy);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &item);
  m.impl("histc", &histc);
  m.impl("record_stream", &record_stream);
}

const bool ready = [] {
  c10::SetAllocator(kDevice.type(), &memory);
  return true;
}();

}  // namespace
