"""Set before torch is imported anywhere: tests run side by side, so one thread each, and no bars among their output."""

import os

os.environ["ASYM_PROGRESS"] = "off"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
