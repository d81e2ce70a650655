"""The machine room: sessions, runs, seams and the base class of methods. Knows no method and no model family."""
