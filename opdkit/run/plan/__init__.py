"""What a run will do and take, before anything is loaded: formula, models, memory by part, time by
phase. Estimates, not measurements.
"""

from opdkit.run.plan.changes import Change
from opdkit.run.plan.devices import KNOWN, Device, find_device
from opdkit.run.plan.estimate import RunPlan, fitting, plan
from opdkit.run.plan.use import use_of
from opdkit.run.plan.work import Rates

__all__ = [
    "KNOWN",
    "Change",
    "Device",
    "Rates",
    "RunPlan",
    "find_device",
    "fitting",
    "plan",
    "use_of",
]
