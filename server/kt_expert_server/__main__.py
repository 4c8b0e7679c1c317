"""``python -m kt_expert_server`` is ``kt-expert-server``."""

import sys

from kt_expert_server.cli.serve import main

sys.exit(main())
