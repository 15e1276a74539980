"""When a run measures and when it saves: the keys that must agree."""

from tnl.recipe import complaints
from tnl.recipe.sections import DataSection, TrainSection


def settle(data: DataSection, train: TrainSection, notices: list[str]) -> None:
    """Make evaluation and saving agree: what the recipe leaves open follows what it says; without held-out records none is measured."""
    said = set(train.model_fields_set)
    measured = data.eval not in (None, 0)
    if not measured:
        if train.save_strategy == "best" and "save_strategy" in said:
            raise complaints.Complaint(
                ("train", "save_strategy"), "is best, and nothing is held out (data.eval is 0)", "Set data.eval, for example to 0.05."
            )
        wanted = [key for key in ("eval_strategy", "load_best_model_at_end") if key in said and getattr(train, key) not in ("no", False)]
        if wanted:
            notices.append(f"train.{' and train.'.join(wanted)}: data.eval is 0, so nothing is measured")
        train.eval_strategy, train.load_best_model_at_end = "no", False
    if train.eval_strategy == "no" and train.load_best_model_at_end:
        if "load_best_model_at_end" in said or train.save_strategy == "best":
            raise complaints.Complaint(("train", "eval_strategy"), 'is "no", so there is no best checkpoint', "Write steps or epoch.")
        train.load_best_model_at_end = False
    if train.load_best_model_at_end:
        if "save_strategy" not in said:
            train.save_strategy = train.eval_strategy
        elif "eval_strategy" not in said and train.save_strategy in ("steps", "epoch"):
            train.eval_strategy = train.save_strategy  # type: ignore[assignment]
        if "save_steps" not in said and train.eval_steps is not None:
            train.save_steps = train.eval_steps
    if train.eval_strategy == "steps" and train.eval_steps is None:
        train.eval_steps = train.save_steps if train.save_strategy == "steps" else train.logging_steps
    if train.load_best_model_at_end:
        _agree(train, "load_best_model_at_end" in said)


def _agree(train: TrainSection, insisted: bool) -> None:
    if train.save_strategy == "no":
        if insisted:
            raise complaints.Complaint(("train", "save_strategy"), 'is "no", so there is no best checkpoint', "Write steps or epoch.")
        train.load_best_model_at_end = False
    elif train.save_strategy not in ("best", train.eval_strategy):
        what = f"is {train.save_strategy} and train.eval_strategy is {train.eval_strategy} (needed: the same, to keep the best checkpoint)"
        raise complaints.Complaint(("train", "save_strategy"), what, "Make them equal, or set train.load_best_model_at_end: false.")
    elif train.save_strategy == "steps" and train.save_steps % (train.eval_steps or 1) != 0 and train.save_steps >= 1:
        what = f"is {train.save_steps}, no multiple of train.eval_steps, {train.eval_steps}: a checkpoint would have no held-out loss"
        raise complaints.Complaint(("train", "save_steps"), what, "Make it a multiple.")
