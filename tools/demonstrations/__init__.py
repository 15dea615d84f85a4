"""Classic demonstrations of ⵟ units in the plane, a script and a picture each; `docs/demonstrations.md` shows them."""
