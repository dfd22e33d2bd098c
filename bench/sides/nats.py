TRANSPORTS = ("ipc", "tcp")
ROLES = {}


def missing():
    return "not yet"
