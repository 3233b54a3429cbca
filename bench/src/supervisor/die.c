// A process that fails as soon as it is started.
int main(void) { return 1; }
