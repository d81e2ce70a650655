"""Feature sources: `sprites` (bundled), `inception:PATH`, `clip:DIR_OR_ID`, `module:PACKAGE:FUNCTION`."""
