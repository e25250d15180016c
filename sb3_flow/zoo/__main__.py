from sb3_flow.zoo.cli import main

if __name__ == "__main__":
    main()
