"""Numbers are compared as a CPU computes them, also on a machine with a GPU, which is hidden.

`make gpu` names a CUDA device in WEAVER_TEST_DEVICE, on which the engine's tests then compute.
"""

import os

if not os.environ.get("WEAVER_TEST_DEVICE", "").startswith("cuda"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
