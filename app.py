"""The demo, as a hosted space starts it: ``python app.py``. All options are those of ``diffusion-features app``."""

from __future__ import annotations

import os
import sys

from diffusion_features.cli import main

if __name__ == "__main__":
    hosted = ["--public", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")] if "SPACE_ID" in os.environ else []
    sys.exit(main(["app", *hosted, *sys.argv[1:]]))
