import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.MethodDescriptor.MethodType;
import io.grpc.Status;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;

/**
 * A caller with grpc-java. It passes messages as bytes, so it needs no generated code:
 *
 * <p>Caller ADDRESS SCENARIO MESSAGE prints one line of JSON: code, message, details and answers.
 */
public final class Caller {
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  private static final MethodDescriptor.Marshaller<byte[]> BYTES =
      new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] value) {
          return new ByteArrayInputStream(value);
        }

        @Override
        public byte[] parse(InputStream stream) {
          try {
            return stream.readAllBytes();
          } catch (IOException error) {
            throw new UncheckedIOException(error);
          }
        }
      };

  private static MethodDescriptor<byte[], byte[]> method(String name, MethodType type) {
    return MethodDescriptor.newBuilder(BYTES, BYTES)
        .setFullMethodName("digits.v1.DigitClassifierService/" + name)
        .setType(type)
        .build();
  }

  private static final MethodDescriptor<byte[], byte[]> CLASSIFY =
      method("Classify", MethodType.UNARY);
  private static final MethodDescriptor<byte[], byte[]> STREAM =
      method("ClassifyStream", MethodType.BIDI_STREAMING);

  /** What became of a call. */
  private static final class Result extends ClientCall.Listener<byte[]> {
    final List<byte[]> answers = new ArrayList<>();
    final CountDownLatch closed = new CountDownLatch(1);
    final ClientCall<byte[], byte[]> call;
    Status status = Status.OK;
    byte[] details = new byte[0];
    int calls = 1;

    Result(ClientCall<byte[], byte[]> call) {
      this.call = call;
    }

    @Override
    public void onMessage(byte[] message) {
      answers.add(message);
      call.request(1);
    }

    @Override
    public void onClose(Status status, Metadata trailers) {
      this.status = status;
      details = trailers.containsKey(DETAILS) ? trailers.get(DETAILS) : details;
      closed.countDown();
    }

    String json() {
      Base64.Encoder encoder = Base64.getEncoder();
      String shown =
          answers.stream()
              .map(answer -> '"' + encoder.encodeToString(answer) + '"')
              .collect(Collectors.joining(","));
      String message = String.valueOf(status.getDescription()).replaceAll("[\"\\\\\n]", " ");
      return String.format(
          "{\"code\": %d, \"message\": \"%s\", \"details\": \"%s\", \"answers\": [%s], \"calls\": %d}",
          status.getCode().value(), message, encoder.encodeToString(details), shown, calls);
    }
  }

  private static Result ask(
      ManagedChannel channel,
      MethodDescriptor<byte[], byte[]> method,
      CallOptions options,
      byte[] message,
      int count)
      throws InterruptedException {
    Result result = new Result(channel.newCall(method, options));
    result.call.start(result, new Metadata());
    result.call.request(2);
    for (int i = 0; i < count; i++) {
      result.call.sendMessage(message);
    }
    result.call.halfClose();
    result.closed.await(60, TimeUnit.SECONDS);
    return result;
  }

  private static Result unary(ManagedChannel channel, CallOptions options, byte[] message)
      throws InterruptedException {
    return ask(channel, CLASSIFY, options, message, 1);
  }

  /** Calls until one of them is under way when it is cancelled. */
  private static Result cancelled(ManagedChannel channel, byte[] message)
      throws InterruptedException {
    for (int calls = 1; ; calls++) {
      Result result = new Result(channel.newCall(CLASSIFY, CallOptions.DEFAULT));
      result.calls = calls;
      result.call.start(result, new Metadata());
      result.call.request(2);
      result.call.sendMessage(message);
      result.call.halfClose();
      result.call.cancel("changed my mind", null);
      result.closed.await(60, TimeUnit.SECONDS);
      if (!result.status.isOk()) {
        return result;
      }
    }
  }

  /** Goes on until standard input ends, and tells the first failure. */
  private static Result calls(ManagedChannel channel, byte[] message) throws Exception {
    Thread ended = new Thread(Caller::readInput);
    ended.start();
    Result result = null;
    for (int calls = 1; ended.isAlive(); calls++) {
      result = unary(channel, CallOptions.DEFAULT, message);
      result.calls = calls;
      if (!result.status.isOk()) {
        break;
      }
      if (calls == 50) {
        System.out.println("started");
      }
    }
    return result;
  }

  private static void readInput() {
    try {
      System.in.readAllBytes();
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }

  public static void main(String[] arguments) throws Exception {
    byte[] message = Files.readAllBytes(Path.of(arguments[2]));
    ManagedChannel channel =
        NettyChannelBuilder.forTarget(arguments[0])
            .usePlaintext()
            .maxInboundMessageSize(1 << 26)
            .defaultLoadBalancingPolicy("round_robin")
            .build();
    Result result =
        switch (arguments[1]) {
          case "unary" -> unary(channel, CallOptions.DEFAULT, message);
          case "gzip" -> unary(channel, CallOptions.DEFAULT.withCompression("gzip"), message);
          case "deadline" ->
              unary(
                  channel,
                  CallOptions.DEFAULT.withDeadlineAfter(1, TimeUnit.NANOSECONDS),
                  message);
          case "stream" -> ask(channel, STREAM, CallOptions.DEFAULT, message, 100);
          case "cancel" -> cancelled(channel, message);
          case "calls" -> calls(channel, message);
          default -> throw new IllegalArgumentException(arguments[1]);
        };
    System.out.println(result.json());
    System.exit(0);
  }
}
