-- The phases and kinds of requests that nginx has beside the common ones: TLS handshakes, balancers, subrequests,
-- connections that are kept, HTTP/2, requests that end in the middle, a worker that is almost gone.
local broker = require "support.broker"
local nginx = require "support.nginx"
local tls = require "support.tls"
local ok = broker.ok

-- An HTTPS server of its own, with phases before there is a request.
local http = [[
  client_body_buffer_size 64k;
  upstream balanced {
    server 0.0.0.1;
    balancer_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      assert(rabbit.publish_async("balancer", { routing_key = "$queue" }))
      ngx.log(ngx.NOTICE, "in balancer: ", select(2, pcall(rabbit.publish, "x")), " end")
      assert(require "ngx.balancer".set_current_peer("127.0.0.1", $port))
    }
  }
  init_worker_by_lua_block {
    local rabbit = require "moonrabbit.resty"
    rabbit.start { uri = os.getenv "AMQP_URL", exit_timeout = 2 }
    assert(rabbit.publish_async("init_worker", { routing_key = "$queue" }))
    local publisher = rabbit.publisher { routing_key = "$queue" }
    local calls = {
      publish = function() rabbit.publish "x" end, send = function() publisher:send "x" end,
      call = function() rabbit.call("x", { routing_key = "q" }) end, run = function() rabbit.run(print) end,
      connect = function() rabbit.connect "amqp://" end, request_body = rabbit.request_body,
    }
    function Cannot(phase)
      for name, fn in pairs(calls) do
        ngx.log(ngx.NOTICE, "in ", phase, ", ", name, ": ", select(2, pcall(fn)), " end")
      end
    end
  }
  exit_worker_by_lua_block {
    local ok, err = require "moonrabbit.resty".publish_async("exit_worker", { routing_key = "$queue" })
    ngx.log(ngx.NOTICE, "in exit_worker: ", tostring(ok), " ", err and err.kind or "", " ", tostring(err), " end")
    ngx.log(ngx.NOTICE, "publish in exit_worker: ", select(2, pcall(require "moonrabbit.resty".publish, "x")), " end")
  }
  server {
    listen 127.0.0.1:$secure ssl http2;
    ssl_certificate $folder/server.pem;
    ssl_certificate_key $folder/server.key;
    # Without OpenResty's patches nginx ends a handshake that yields: who waits for no time does not.
    ssl_client_hello_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      assert(rabbit.publish_async("ssl_client_hello", { routing_key = "$queue" }))
      local _, err = rabbit.publish("no time", { routing_key = "$queue", timeout = 0 })
      ngx.log(ngx.NOTICE, "in ssl_client_hello: ", err.kind, " ", err.message, " end")
    }
    ssl_certificate_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      assert(rabbit.publish_async("ssl_certificate", { routing_key = "$queue" }))
      local _, err = rabbit.publish("no time", { routing_key = "$queue", timeout = 0 })
      ngx.log(ngx.NOTICE, "in ssl_certificate: ", err.kind, " ", err.message, " end")
    }
    location / {
      content_by_lua_block {
        local rabbit = require "moonrabbit.resty"
        assert(rabbit.publish(rabbit.request_body(), { routing_key = "$queue" }))
        ngx.say(ngx.req.http_version())
      }
    }
  }
]]

local locations = [[
  location = /ping { return 200 "pong\n"; }
  location = /balanced { proxy_pass http://balanced/ping; }
  location = /inner {
    content_by_lua_block {
      assert(require "moonrabbit.resty".publish("inner " .. ngx.var.arg_n, { routing_key = "$queue" }))
      ngx.print(ngx.var.arg_n)
    }
    log_by_lua_block { require "moonrabbit.resty".publish_async("never", { routing_key = "$queue" }) }
  }
  location = /outer {
    content_by_lua_block {
      local a, b = ngx.location.capture_multi { { "/inner?n=1" }, { "/inner?n=2" } }
      assert(require "moonrabbit.resty".publish("outer", { routing_key = "$queue" }))
      ngx.say(a.body, b.body)
    }
  }
  location = /cannot {
    set_by_lua_block $nothing { Cannot "set" }
    content_by_lua_block { ngx.say "ok" }
    header_filter_by_lua_block { Cannot "header_filter" }
    body_filter_by_lua_block { Cannot "body_filter" }
    log_by_lua_block { Cannot "log" }
  }
  location = /exit {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      for i = 1, 5 do
        ngx.thread.spawn(function() rabbit.publish("left " .. i, { routing_key = "$queue" }) end)
      end
      ngx.thread.spawn(function() rabbit.run(function() ngx.sleep(0.05) end) end)
      ngx.exit(ngx.HTTP_NO_CONTENT)
    }
  }
  location = /exec {
    rewrite_by_lua_block {
      assert(require "moonrabbit.resty".publish("before exec", { routing_key = "$queue" }))
      ngx.exec("/inner?n=exec")
    }
  }
  location = /publish {
    content_by_lua_block {
      assert(require "moonrabbit.resty".publish(ngx.var.arg_body, { routing_key = "$queue" }))
      ngx.header["Content-Length"] = 2
      ngx.print "ok"
    }
  }
  location = /stats {
    content_by_lua_block {
      local stats = require "moonrabbit.resty".stats()
      ngx.say(stats.in_flight, " ", stats.queued, " ", stats.calls, " ", stats.bytes, " ", ngx.timer.running_count())
    }
  }
]]

describe("the other phases of nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local channel, queue, server, folder, secure

  local function fill(text)
    return (text:gsub("%$(%l+)", { queue = queue, folder = folder, secure = secure }))
  end

  setup(function()
    channel = ok(broker.connect():channel())
    queue, folder, secure = broker.unique "phases", tls.certificates(), nginx.free_port()
    ok(channel:queue_declare(queue, { durable = true }))
    server = nginx.start({ http = fill(http), server = fill(locations) }):ready "/ping"
  end)

  teardown(function()
    server:stop()
    channel:queue_delete(queue)
    broker.close_all()
    tls.remove(folder)
  end)

  -- The next n bodies, sorted; there are no more.
  local function take(n)
    local list = {}
    broker.eventually(function()
      local message = ok(channel:get(queue, { no_ack = true }))
      if message then list[#list + 1] = message.body end
      return #list >= n
    end, 10, n .. " messages")
    assert.is_false(channel:get(queue, { no_ack = true }))
    table.sort(list)
    return list
  end

  it("init_worker: what is put into the queue waits for the connection", function()
    assert.same({ "init_worker" }, take(1))
  end)

  it("TLS handshakes may publish, and HTTP/2 is HTTP", function()
    if nginx.shell "command -v curl" == "" then return pending "curl is not installed" end
    local said = nginx.shell(("env -u LD_PRELOAD curl -sSk --max-time 20 --http2 -d two https://127.0.0.1:%d/ 2>&1")
      :format(secure))
    assert.equal("2", said, server:log())
    assert.same({ "ssl_certificate", "ssl_client_hello", "two" }, take(3))
    for _, phase in ipairs { "ssl_client_hello", "ssl_certificate" } do
      server:logged("in " .. phase .. ": timeout the message was not sent within 0 s end")
    end
  end)

  it("a balancer may publish, and may not wait", function()
    assert.equal("pong\n", (server:request "/balanced"), server:log())
    assert.same({ "balancer" }, take(1))
    server:logged "in balancer: [^\n]*publish waits, which is impossible in balancer_by_lua%*[^\n]*publish_async is for"
  end)

  it("says what cannot be called in phases that cannot wait", function()
    assert.equal("ok\n", (server:request "/cannot"), server:log())
    for _, phase in ipairs { "set", "header_filter", "body_filter", "log" } do
      for _, name in ipairs { "publish", "send", "call", "run", "connect", "request_body" } do
        server:logged(("in %s, %s: [^\n]*%s waits, which is impossible in %s_by_lua%%*: [^\n]* end"):format(phase, name,
          name, phase))
      end
    end
    assert.is_nil(channel:get(queue, { no_ack = true }) or nil)
  end)

  it("subrequests and internal redirects publish as requests do", function()
    assert.equal("12\n", (server:request "/outer"), server:log())
    assert.same({ "inner 1", "inner 2", "outer" }, take(3))
    assert.equal("exec", (server:request "/exec"), server:log())
    assert.same({ "before exec", "inner exec", "never" }, take(3))
  end)

  it("a request that ends in the middle takes nothing back, and leaves nothing behind", function()
    assert.equal(204, (select(2, server:request "/exit")), server:log())
    assert.same({ "left 1", "left 2", "left 3", "left 4", "left 5" }, take(5))
    broker.eventually(function() return (server:request "/stats") == "0 0 0 0 1\n" end, 10, "nothing is left")
  end)

  it("one connection of a client has many requests", function()
    local bodies = {}
    server:request("/publish?body=kept0", { version = "1.1", on = function(transport)
      for i = 1, 5 do
        local answer = ""
        while not answer:find "\r\n\r\nok$" do answer = answer .. assert(transport:read(65536, 5)) end
        transport:write(("GET /publish?body=kept%d HTTP/1.1\r\nHost: x\r\n%s\r\n"):format(i,
          i == 5 and "Connection: close\r\n" or ""))
      end
      for i = 0, 5 do bodies[#bodies + 1] = "kept" .. i end
    end })
    assert.same(bodies, take(6))
  end)

  it("a worker that is gone but for its last phase takes nothing", function()
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
    server:logged "in exit_worker: nil shutdown [^\n]* end"
    server:logged "publish in exit_worker: [^\n]*waits, which is impossible in exit_worker_by_lua%*"
    assert.is_false(channel:get(queue, { no_ack = true }))
  end)
end)
