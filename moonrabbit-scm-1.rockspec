rockspec_format = "3.0"
package = "moonrabbit"
version = "scm-1"

-- For a checkout: luarocks make
source = {
  url = "git+file://.",
  branch = "main",
}

description = {
  summary = "RabbitMQ for Lua: confirms and acks in C, routing and retries as Lua scripts",
  detailed = [[
A RabbitMQ client whose AMQP 0-9-1 engine is written in C without a socket of its own, so that the same
code runs in plain scripts, in event loops and in nginx workers. Publisher confirms and consumer
acknowledgements are handled in the core; routing, retries and dead letters are Lua that you write.]],
  license = "MIT",
  labels = { "rabbitmq", "amqp", "messaging", "queue", "openresty" },
}

dependencies = {
  "lua >= 5.1, < 5.5",
  "argparse >= 0.7", -- the command line tool
}

test_dependencies = {
  "busted >= 2.0",
  "lua-cjson >= 2.1",
}

external_dependencies = {
  RABBITMQ = { header = "amqp.h", library = "rabbitmq" },
  OPENSSL = { header = "openssl/ssl.h", library = "ssl" },
  CRYPTO = { header = "openssl/crypto.h", library = "crypto" },
}

build = {
  type = "builtin",
  -- scripts/rockspec-check compares the two lists with csrc/, and --fix writes them.
  modules = {
    ["moonrabbit.core"] = {
      sources = {
        "csrc/core/ack.c",
        "csrc/core/buffer.c",
        "csrc/core/calls.c",
        "csrc/core/channel.c",
        "csrc/core/commands.c",
        "csrc/core/config.c",
        "csrc/core/confirm.c",
        "csrc/core/consumers.c",
        "csrc/core/content.c",
        "csrc/core/end.c",
        "csrc/core/engine.c",
        "csrc/core/frames.c",
        "csrc/core/handshake.c",
        "csrc/core/method.c",
        "csrc/core/props.c",
        "csrc/core/publish.c",
        "csrc/core/replies.c",
        "csrc/core/send.c",
        "csrc/core/settle.c",
        "csrc/core/table.c",
        "csrc/core/wire.c",
        "csrc/lua/channel.c",
        "csrc/lua/check.c",
        "csrc/lua/confirmation.c",
        "csrc/lua/core.c",
        "csrc/lua/engine.c",
        "csrc/lua/message.c",
        "csrc/lua/methods.c",
        "csrc/lua/options.c",
        "csrc/lua/publish.c",
        "csrc/lua/pump.c",
        "csrc/lua/queue.c",
        "csrc/lua/random.c",
        "csrc/lua/state.c",
        "csrc/lua/typed.c",
        "csrc/lua/values.c",
      },
      defines = { "_GNU_SOURCE" },
      libraries = { "rabbitmq", "m" },
      incdirs = { "csrc", "$(RABBITMQ_INCDIR)" },
      libdirs = { "$(RABBITMQ_LIBDIR)" },
    },
    ["moonrabbit.net"] = {
      sources = {
        "csrc/lua/net.c",
        "csrc/lua/net_address.c",
        "csrc/lua/net_alarm.c",
        "csrc/lua/net_poll.c",
        "csrc/lua/net_process.c",
        "csrc/lua/net_server.c",
        "csrc/lua/net_stream.c",
        "csrc/lua/net_tls.c",
        "csrc/net/address.c",
        "csrc/net/alarm.c",
        "csrc/net/clock.c",
        "csrc/net/descriptor.c",
        "csrc/net/listen.c",
        "csrc/net/pin.c",
        "csrc/net/poll.c",
        "csrc/net/process.c",
        "csrc/net/resolve.c",
        "csrc/net/result.c",
        "csrc/net/signals.c",
        "csrc/net/stream.c",
        "csrc/net/tls.c",
        "csrc/net/tls_bio.c",
        "csrc/net/tls_context.c",
        "csrc/net/tls_error.c",
      },
      defines = { "_GNU_SOURCE" },
      libraries = { "ssl", "crypto", "pthread" },
      incdirs = { "csrc", "$(OPENSSL_INCDIR)" },
      libdirs = { "$(OPENSSL_LIBDIR)", "$(CRYPTO_LIBDIR)" },
    },
  },
  install = {
    bin = { moonrabbit = "bin/moonrabbit" },
  },
}

test = {
  type = "busted",
}
