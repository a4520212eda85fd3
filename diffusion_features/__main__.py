"""``python -m diffusion_features`` is the console script ``diffusion-features``."""

import sys

from diffusion_features.cli import main

sys.exit(main())
