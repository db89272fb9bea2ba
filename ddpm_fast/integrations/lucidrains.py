KNOWN = ""


def recognises(pipeline: object) -> bool:
    return False
