from jaxpack.cli import main

main()
