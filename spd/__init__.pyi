from spd.component_model import ComponentModel as ComponentModel
from spd.components import SiteMask as SiteMask
from spd.config import RunError as RunError
from spd.config import UserError as UserError
from spd.optimize import decompose as decompose
from spd.problem import Problem as Problem
from spd.runs.run import load_run as load_run
from spd.spd_config import SPDConfig as SPDConfig
