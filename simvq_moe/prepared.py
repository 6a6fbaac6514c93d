"""Imports all that every run needs, and does nothing that a run would do; see `forked_run`."""

from simvq_moe import cli
from simvq_moe.commands import training as commands
from simvq_moe.engine.build import import_compiler
from simvq_moe.engine.settings import import_deepspeed
from simvq_moe.training import run

assert cli
assert commands
assert run
import_deepspeed()
import_compiler(compiles=False)
