"""What several rewards share: checks of what they return, CLIP and BLIP files, detectors, HTTP."""
