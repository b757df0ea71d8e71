"""What a run will do and take, before anything is loaded: formula, models, memory by part, time by
phase. Estimates, not measurements.
"""

from opdkit.run.plan.changes import Change
from opdkit.run.plan.devices import KNOWN, Device, find_device
from opdkit.run.plan.estimate import RunPlan, fitting, plan
from opdkit.run.plan.layouts import Layouts, plan_on
from opdkit.run.plan.machines import Machines, find_machines
from opdkit.run.plan.use import use_of
from opdkit.run.plan.work import Rates

__all__ = [
    "KNOWN",
    "Change",
    "Device",
    "Layouts",
    "Machines",
    "Rates",
    "RunPlan",
    "find_device",
    "find_machines",
    "fitting",
    "plan",
    "plan_on",
    "use_of",
]
