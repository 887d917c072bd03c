"""Methods: one file each, behind one contract (`base`), one fit and one way to assemble."""
