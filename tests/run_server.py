"""Imported once by the server that the test runs are forked from: what every run needs anyway."""

import multiprocessing
import threading

import torch._dynamo  # noqa: F401  (the first optimizer imports it)
from tqdm import tqdm

import spd.experiments.tms.plots  # noqa: F401
import tests.run_fixtures  # noqa: F401
from spd.reports.figures import loss_curves
from spd.reports.png import png_bytes

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed run would leave behind

if multiprocessing.parent_process() is None:  # matplotlib's fonts and number formats
    png_bytes(loss_curves([{"step": step, "loss/a": 10.0**-step} for step in range(5)]))
