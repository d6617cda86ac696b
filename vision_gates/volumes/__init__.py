"""MRI and CT volumes: geometry, reading, preprocessing, inference and writing. Needs ``pip install
'vision-gates[volumes]'``; import the modules, such as ``vision_gates.volumes.reading``."""
