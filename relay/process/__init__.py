"""What a process is, before it is a relay or a report: its standard streams, its limits, its signals.

==============  ========================================================================================
`program`       what every program here does around its own work, whatever it was started with
`command_line`  what docopt makes of one, and what is wrong with it
`signals`       what each signal means to a worker
`log`           the lines that it tells the operator
`memory`        memory that it may not have, and what to do about it
`addresses`     addresses of this machine to listen on, and what the system has against them
`one_by_one`    something is done for each of many, and a mistake with one is no other's trouble
`fd_limit`      how many file descriptors this process may have
`dataclass`     as the standard library's, in a fraction of the memory
`discreet`      what the log tells of an exception, and nothing of whom it was with
`folders`       whether something can be made in one
`shown`         the name of a file for people and programs to read
`temporary`     a folder for what a program needs for a moment
==============  ========================================================================================

Nothing here knows what the program is for, and nothing is imported but the standard library and docopt.
"""
