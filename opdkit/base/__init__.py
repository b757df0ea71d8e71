"""What every room uses: errors that teach, whole files, progress, strict settings, the address of
one's own code.
"""
