"""The command line. Verbs import what they need when they run: ``--help`` needs neither torch nor transformers."""
