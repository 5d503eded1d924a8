"""What the record of an audited layer says of its own figures."""


def layer_status(layer: dict) -> str:
    """The first status of the layer that is not ok."""
    statuses = [layer["I_XL"]["before"]["status"], layer["I_XL"]["after"]["status"], layer["V_LY"]["status"]]
    worst = next((status for status in statuses if status not in ("ok", "not_applicable")), "ok")
    return "scale changed" if worst == "ok" and scale_changed(layer) else worst


def scale_changed(record: dict) -> bool:
    """Whether the layer's scale moved so far that the retained share says more about it than about information."""
    return any(warning["code"] == "SCALE_CHANGED" for warning in record["warnings"])
