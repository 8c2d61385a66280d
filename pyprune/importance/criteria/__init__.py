"""The criteria that come with pyprune, one file each; a new one is a file here and a line below."""

from pyprune.importance.criteria import (
    flap,
    group_fisher,
    l1,
    l2,
    obs,
    param_first,
    param_mix,
    param_second,
    random,
    reap,
    token_fisher,
    vectorize,
    wanda,
)
from pyprune.importance.registry import register

register(random.CRITERION)
register(l1.CRITERION)
register(l2.CRITERION)
register(vectorize.CRITERION)
register(param_first.CRITERION, "taylor")
register(param_second.CRITERION, "fisher")
register(param_mix.CRITERION)
register(group_fisher.CRITERION)
register(token_fisher.CRITERION)
register(wanda.CRITERION)
register(flap.CRITERION)
register(obs.CRITERION)
register(reap.CRITERION)
