"""The files of a teacher, in any of the forms in which SD-1.x models lie on disks, as one diffusers folder."""
