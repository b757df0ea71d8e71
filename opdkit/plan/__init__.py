"""What a run will do and take, before anything is loaded: formula, models, memory by part, time by phase. Estimates, not measurements."""

from opdkit.plan.changes import Change
from opdkit.plan.devices import KNOWN, Device, device_of
from opdkit.plan.estimate import Plan, plan
from opdkit.plan.use import use_of
from opdkit.plan.work import Rates

__all__ = ["KNOWN", "Change", "Device", "Plan", "Rates", "device_of", "plan", "use_of"]
