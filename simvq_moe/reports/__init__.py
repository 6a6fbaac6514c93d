"""What people look at: report, tables, figures, live table and dashboard; it computes no
statistics.
"""
