class BrokenImage(ValueError):
    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}")
