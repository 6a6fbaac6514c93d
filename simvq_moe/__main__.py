"""`python -m simvq_moe` and `deepspeed --module simvq_moe`."""

import sys

from simvq_moe.cli import main

sys.exit(main())
