"""Several devices and several processes: the mesh, placement of arrays, and agreement between
processes.
"""
