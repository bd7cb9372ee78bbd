"""The hand-over: a folder that an edge team can trust, verify and run, without PyTorch. Its format is docs/bundle.md.

`make.make` writes one from a run, `read.read` reads one as a stranger's files, `verify.verify` says what a device
finds; `polar-deploy bundle` has the commands.
"""
