"""``python -m nowcast_lab.demo.training_job``: train a small network, nowcast by a service or alone.

It is an ordinary training job; everything about nowcasting in it is the `attach` call and `handle.observe(loss)`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from nowcast_lab.demo.training_job.train import main
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        sys.exit("the demo trains a network and needs PyTorch: pip install torch")
    sys.exit(main())
