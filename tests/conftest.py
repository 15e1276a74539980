"""For every test: one thread each, since the models are tiny and the runners are two; Triton in its interpreter where there is no card."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for the processes that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be chosen before kernels are defined
