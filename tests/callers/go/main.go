// A caller with grpc-go. It passes messages as bytes, so it needs no generated code:
//
//	caller ADDRESS SCENARIO < MESSAGE
//
// prints one line of JSON: code, message, details and answers (base64).
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const service = "/digits.v1.DigitClassifierService/"

type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                       { return "proto" }

type result struct {
	Code    uint32   `json:"code"`
	Message string   `json:"message"`
	Details []byte   `json:"details"`
	Answers [][]byte `json:"answers"`
	Calls   int      `json:"calls"`
}

func ended(r *result, err error, trailer metadata.MD) {
	said := status.Convert(err)
	r.Code, r.Message = uint32(said.Code()), said.Message()
	if found := trailer.Get("grpc-status-details-bin"); len(found) > 0 {
		r.Details = []byte(found[0])
	}
}

func unary(conn *grpc.ClientConn, message []byte, timeout time.Duration, options ...grpc.CallOption) *result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	r, answer, trailer := &result{Calls: 1}, []byte{}, metadata.MD{}
	err := conn.Invoke(ctx, service+"Classify", &message, &answer, append(options, grpc.Trailer(&trailer))...)
	ended(r, err, trailer)
	if err == nil {
		r.Answers = [][]byte{answer}
	}
	return r
}

func stream(conn *grpc.ClientConn, message []byte, count int) *result {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r := &result{Calls: 1}
	both := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	s, err := conn.NewStream(ctx, both, service+"ClassifyStream")
	if err == nil {
		go func() {
			for i := 0; i < count; i++ {
				_ = s.SendMsg(&message)
			}
			_ = s.CloseSend()
		}()
		for {
			var answer []byte
			if err = s.RecvMsg(&answer); err != nil {
				break
			}
			r.Answers = append(r.Answers, answer)
		}
	}
	if err == io.EOF {
		err = nil
	}
	ended(r, err, nil)
	return r
}

func cancelled(conn *grpc.ClientConn, message []byte) *result {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { time.Sleep(time.Millisecond); cancel() }()
	r, answer := &result{}, []byte{}
	var err error
	for err == nil { // one of them is under way when it is cancelled
		err = conn.Invoke(ctx, service+"Classify", &message, &answer)
		r.Calls++
	}
	ended(r, err, nil)
	return r
}

// calls goes on until its input ends, and tells the first failure.
func calls(conn *grpc.ClientConn, message []byte, stop chan struct{}) *result {
	r := &result{}
	for {
		select {
		case <-stop:
			return r
		default:
		}
		one := unary(conn, message, time.Minute)
		r.Calls++
		if one.Code != 0 {
			one.Calls = r.Calls
			return one
		}
		if r.Calls == 50 {
			fmt.Println("started")
		}
	}
}

func main() {
	address, scenario := os.Args[1], os.Args[2]
	message, _ := os.ReadFile(os.Args[3])
	conn, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(1<<26)),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
	if err != nil {
		panic(err)
	}
	var r *result
	switch scenario {
	case "unary":
		r = unary(conn, message, time.Minute)
	case "gzip":
		r = unary(conn, message, time.Minute, grpc.UseCompressor(gzip.Name))
	case "deadline":
		r = unary(conn, message, time.Nanosecond)
	case "stream":
		r = stream(conn, message, 100)
	case "cancel":
		r = cancelled(conn, message)
	case "calls":
		stop := make(chan struct{})
		go func() { _, _ = io.ReadAll(os.Stdin); close(stop) }()
		r = calls(conn, message, stop)
	}
	line, _ := json.Marshal(r)
	fmt.Println(string(line))
}
