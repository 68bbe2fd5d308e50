"""What a run will need, before it runs: `deepspeed plan`, and `plan_run` for programs."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Plan": "deepspeed.planner.plan:Plan",
        "Workload": "deepspeed.planner.plan:Workload",
        "plan_run": "deepspeed.planner.plan:plan_run",
    },
    ("advice", "command", "plan", "report", "workload"),
)
