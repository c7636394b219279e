"""Imported once by the server that the test runs are forked from: what every run needs anyway."""

import multiprocessing
import threading

import scipy.optimize  # noqa: F401
import torch._dynamo  # noqa: F401  (the first optimizer imports it)
from tqdm import tqdm

import spd.experiments.tms.plots  # noqa: F401
import tests.run_fixtures  # noqa: F401
import tests.undrawn  # noqa: F401
from spd.engine.fingerprint import objective_fingerprint
from spd.reports.figures import loss_curves
from spd.reports.page import HERE, templates_of
from spd.reports.png import png_bytes

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed run would leave behind

if multiprocessing.parent_process() is None:
    objective_fingerprint()
    templates_of(HERE).get_template("report.html.j2")
    # matplotlib's fonts and number formats
    png_bytes(loss_curves([{"step": step, "loss/a": 10.0**-step} for step in range(5)]))
