from tnl.cli import main

main()
