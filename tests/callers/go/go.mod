module caller

go 1.23

require google.golang.org/grpc v1.75.0
