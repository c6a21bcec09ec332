-- moonrabbit.resty's publishing: from every phase, with confirms, bounded, and what it says of mistakes.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local cjson = require "cjson.safe"
local nginx = require "support.nginx"
local ok = broker.ok

local locations = [[
  location /ping { return 200 "pong\n"; }
  location /publish {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local args = ngx.req.get_uri_args()
      local body = rabbit.request_body()
      local ok, err = rabbit.publish(body, { routing_key = args.queue, exchange = args.exchange,
        timeout = tonumber(args.timeout),
        headers = { via = "http", large = args.large and ("x"):rep(args.large) } })
      if not ok then ngx.status = 503 end
      ngx.say(ok and "ok" or err.kind .. " " .. tostring(err.temporary) .. " " .. err.message)
    }
  }
  location /phases {
    set_by_lua_block $set {
      assert(require "moonrabbit.resty".publish_async("set", { routing_key = ngx.var.arg_queue }))
      return "x"
    }
    rewrite_by_lua_block { assert(require "moonrabbit.resty".publish("rewrite", { routing_key = ngx.var.arg_queue })) }
    access_by_lua_block { assert(require "moonrabbit.resty".publish("access", { routing_key = ngx.var.arg_queue })) }
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      assert(rabbit.publisher { routing_key = ngx.var.arg_queue, headers = { a = 1 } }:send("content",
        { headers = { b = 2 } }))
      local queue, result = ngx.var.arg_queue
      ngx.timer.at(0, function() result = { rabbit.publish("timer", { routing_key = queue }) } end)
      while not result do ngx.sleep(0.005) end
      ngx.say(tostring(result[1]))
    }
    header_filter_by_lua_block {
      assert(require "moonrabbit.resty".publish_async("header_filter", { routing_key = ngx.var.arg_queue }))
    }
    body_filter_by_lua_block {
      if ngx.arg[2] then
        assert(require "moonrabbit.resty".publish_async("body_filter", { routing_key = ngx.var.arg_queue }))
      end
    }
    log_by_lua_block {
      assert(require "moonrabbit.resty".publish_async("log", { routing_key = ngx.var.arg_queue }))
    }
  }
  location /many {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local log = rabbit.publisher { routing_key = ngx.var.arg_queue }
      for i = 1, tonumber(ngx.var.arg_n) do assert(log:send_async("m" .. i)) end
      ngx.say "ok"
    }
  }
  location /stats {
    content_by_lua_block {
      local stats = require "moonrabbit.resty".stats()
      stats.reason = tostring(stats.reason)
      ngx.say(require "cjson.safe".encode(stats))
    }
  }
  location /run {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local count = assert(rabbit.run(function(conn)
        local ch = assert(conn:channel())
        local declared = assert(ch:queue_declare(ngx and "spec-run", { auto_delete = true }))
        ch:close()
        return declared.message_count
      end))
      ngx.say(count)
      local ran, err = pcall(rabbit.run, function() error "inside" end)
      ngx.say(tostring(ran), " ", err)
      local late, why = rabbit.run(function() ngx.sleep(0.3) end, 0.05)
      ngx.say(tostring(late), " ", why.kind)
    }
  }
  location /call {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local reply, err = rabbit.call(ngx.var.arg_text, { routing_key = ngx.var.arg_queue, timeout = 5 })
      ngx.say(reply and reply.body or err.kind)
    }
  }
  location /mistakes {
    access_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      ngx.ctx.lines = {}
      local function try(...) ngx.ctx.lines[#ngx.ctx.lines + 1] = select(2, pcall(...)) end
      try(rabbit.publish)
      try(rabbit.publish, "x", { rooting_key = "q" })
      try(rabbit.publish, "x", { routing_key = 7 })
      try(rabbit.publish_async, "x", { headers = { f = function() end } })
      try(rabbit.publish, "x", { timeout = -1 })
      try(rabbit.start, {})
      try(rabbit.consume, { queue = "q", handler = print })
      try(rabbit.connect, { uri = "amqp://", runtime = "native" })
      try(rabbit.call, "x", { reply_to = "q" })
      try(rabbit.call, "x", "q")
      try(rabbit.publisher, "q")
      try(rabbit.publisher, { rooting_key = "q" })
      try(rabbit.connect, 7)
      try(rabbit.run, "x")
      local ran, where = pcall(function() rabbit.publish(7) end)
      try(error, where)
      ran, where = pcall(function() rabbit.publisher():send_async("x", { rooting_key = "q" }) end)
      try(error, where)
    }
    content_by_lua_block { ngx.say(table.concat(ngx.ctx.lines, "\n")) }
    log_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      for _, name in ipairs { "publish", "connect", "call", "run", "request_body" } do
        local arguments = { publish = "x", connect = "amqp://", call = "x", run = print }
        local ran, err = pcall(rabbit[name], arguments[name])
        ngx.log(ngx.NOTICE, "in log: ", tostring(ran), " ", err, " end")
      end
    }
  }
]]

describe("publishing in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local server, conn, channel, queue

  setup(function()
    conn = broker.connect()
    channel = ok(conn:channel { confirm = true })
    queue = broker.unique "nginx"
    ok(channel:queue_declare(queue))
    server = nginx.start {
      http = [[
        init_worker_by_lua_block {
          local rabbit = require "moonrabbit.resty"
          local _, twice = rabbit.start { uri = os.getenv "AMQP_URL", entries = 5000, bytes = 1000000, linger = 0.001 }
          _, twice = pcall(rabbit.start, os.getenv "AMQP_URL")
          ngx.log(ngx.NOTICE, "twice: ", twice)
          for _, options in ipairs { { url = "amqp://" }, { uri = "amqp://a:b:c" },
              { uri = "amqps://x/", tls = { ca = "/x" } }, { uri = "amqps://x/?cacertfile=/x" },
              { tls = { min_version = "1.3" } }, { tls = { cert = "/x" } },
              { tls = { cert = "/nowhere.pem", key = "/x" } }, { entries = 0 }, { reconnect = { frist = 1 } },
              { reconnect = { jitter = 2 } }, { runtime = "native" }, { sites = { primary = {} } },
              { sites = { primary = {}, standby = { uri = "amqps://x/", tls = { ca = "/y" } } } },
              { tls = { verfy = false } }, { sites = { primary = { tls = { srever_name = "x" } }, standby = {} } } } do
            options.default = false
            ngx.log(ngx.NOTICE, "start: ", select(2, pcall(rabbit.start, options)), " end")
          end
          ngx.log(ngx.NOTICE, "consume: ", select(2, pcall(rabbit.consume, { queue = "q" })), " end")
          ngx.log(ngx.NOTICE, "consume: ", select(2, pcall(rabbit.consume, { app = "x.lua", queue = "q" })), " end")
          ngx.log(ngx.NOTICE, "publish: ", select(2, pcall(rabbit.publish, "x")), " end")
        }
        client_max_body_size 4m;
        client_body_buffer_size 1m;
      ]],
      server = locations,
    }
    server:ready "/ping"
  end)

  teardown(function()
    server:stop()
    channel:queue_delete(queue)
    broker.close_all()
  end)

  -- Everything in the queue, until n have come.
  local function take(n)
    local list = {}
    broker.eventually(function()
      local message = ok(channel:get(queue, { no_ack = true }))
      if message then list[#list + 1] = message end
      return #list >= n
    end, 10, n .. " messages")
    assert.is_false(channel:get(queue, { no_ack = true }))
    return list
  end

  local function stats()
    return cjson.decode((server:request "/stats"))
  end

  it("answers when the broker has confirmed", function()
    local body, status = server:request("/publish?queue=" .. queue, { body = "hello" })
    assert.equal("ok\n", body, server:log())
    assert.equal(200, status)
    local message = take(1)[1]
    assert.equal("hello", message.body)
    assert.equal("http", message.headers.via)
    assert.equal(2, message.properties.delivery_mode)
  end)

  it("takes messages in every phase", function()
    assert.equal("true\n", (server:request("/phases?queue=" .. queue)), server:log())
    local seen = {}
    for _, message in ipairs(take(8)) do
      seen[message.body] = true
      if message.body == "content" then assert.same({ a = 1, b = 2 }, message.headers) end
    end
    assert.same({ set = true, rewrite = true, access = true, content = true, timer = true, header_filter = true,
      body_filter = true, log = true }, seen)
  end)

  it("says how a publish failed", function()
    local body, status = server:request("/publish?queue=no-such-queue", { body = "x" })
    assert.matches("^unroutable .*312", body)
    assert.equal(503, status)
    assert.matches("^overflow false .*queue of this worker is full",
      (server:request("/publish?queue=" .. queue, { body = ("x"):rep(1000001) })))
  end)

  it("fails the message that cannot be sent, and holds up none", function()
    local body = server:request("/publish?large=200000&queue=" .. queue, { body = "x" })
    assert.matches("^overflow false ", body)
    assert.equal("ok\n", (server:request("/publish?queue=" .. queue, { body = "after" })))
    assert.equal("after", take(1)[1].body)
  end)

  it("learns of confirms though hundreds before them are missing", function()
    if not broker.name then return pending(broker.not_ours()) end
    local stalled = broker.unique "stalled"
    ok(channel:queue_declare(stalled, { durable = true }))
    local process = ('{ok,Q}=rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>,queue,<<"%s">>)),'
      .. "sys:%%s(amqqueue:get_pid(Q))."):format(stalled)
    broker.ctl("eval", process:format "suspend")
    finally(function()
      broker.ctl("eval", process:format "resume")
      channel:queue_delete(stalled)
    end)
    local before = stats()
    assert.equal("ok\n", (server:request("/many?n=600&queue=" .. stalled)), server:log())
    broker.eventually(function() return stats().in_flight == 600 end)
    for i = 1, 3 do
      assert.equal("ok\n", (server:request("/publish?timeout=4&queue=" .. queue, { body = "m" .. i })))
    end
    take(3)
    assert.equal(before.confirmed + 3, stats().confirmed)
    broker.ctl("eval", process:format "resume")
    broker.eventually(function() return stats().confirmed == before.confirmed + 603 end)
  end)

  it("fails the message that the broker closes the channel upon, and no other", function()
    moonrabbit.run(function()
      local answers, answered = {}, 0
      for i = 1, 30 do
        moonrabbit.spawn(function()
          local bad = i % 10 == 5
          answers[i] = server:request(bad and "/publish?exchange=no-such-exchange" or "/publish?queue=" .. queue,
            { body = "m" .. i }) or "-"
          answered = answered + 1
        end)
      end
      broker.eventually(function() return answered == 30 end, 20)
      for i = 1, 30 do
        if i % 10 == 5 then
          assert.matches("^channel .*no exchange 'no%-such%-exchange'", answers[i])
        else
          assert.equal("ok\n", answers[i])
        end
      end
    end)
    -- What was under way on a channel that the broker closed is sent again: some come twice, none is missing.
    local seen, n = {}, 0
    broker.eventually(function()
      local message = ok(channel:get(queue, { no_ack = true }))
      if message and not seen[message.body] then
        seen[message.body] = true
        n = n + 1
      end
      return n == 27
    end, 10)
    broker.eventually(function() return stats().in_flight == 0 end)
    ok(channel:queue_purge(queue))
  end)

  it("sends thousands that nobody waits for, and counts them", function()
    local before = stats()
    assert.equal("ok\n", (server:request("/many?n=3000&queue=" .. queue)), server:log())
    broker.eventually(function() return stats().confirmed == before.confirmed + 3000 end)
    local after = stats()
    assert.equal(before.published + 3000, after.published)
    assert.equal(0, after.queued)
    assert.equal(0, after.in_flight)
    assert.equal(0, after.bytes)
    assert.equal("open", after.state)
    assert.equal(3000, ok(channel:queue_purge(queue)))
  end)

  it("logs and counts what failed with nobody waiting", function()
    local before = stats().failed.unroutable
    assert.equal("ok\n", (server:request "/many?n=100&queue=no-such-queue"))
    broker.eventually(function() return stats().failed.unroutable == before + 100 end)
    server:logged "messages failed with nobody waiting for them: %d+; the last: no queue takes the message"
    local _, lines = server:log():gsub("messages failed with nobody waiting", "")
    assert.truthy(lines < 10, lines)
  end)

  it("runs functions on the connection, and calls", function()
    local lines = {}
    for line in (server:request "/run" or server:log()):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal("0", lines[1])
    assert.matches("^false .*inside", lines[2])
    assert.equal("nil timeout", lines[3])
    local requests = broker.unique "rpc"
    ok(channel:queue_declare(requests))
    local consumer = ok(conn:consume(requests, function(message)
      message:reply(message.body:upper())
      message:ack()
    end))
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = server:request("/call?text=hello&queue=" .. requests) end)
      broker.eventually(function() return answer end)
      assert.equal("HELLO\n", answer, server:log())
    end)
    consumer:cancel()
    ok(channel:queue_delete(requests))
    assert.equal("unroutable\n", (server:request("/call?text=hello&queue=" .. requests)), server:log())
  end)

  it("finishes what its client has left", function()
    local before = stats().confirmed
    server:request("/publish?queue=" .. queue, { body = "left", on = function(transport) transport:close() end })
    assert.equal("left", take(1)[1].body)
    broker.eventually(function() return stats().confirmed == before + 1 end)
  end)

  it("refuses bodies that were buffered to disk", function()
    local body, status = server:request("/publish?queue=" .. queue, { body = ("x"):rep(1500000) })
    assert.equal(500, status, body)
    assert.matches("must be a string, not a nil", server:log())
  end)

  it("says which argument is wrong", function()
    local lines = {}
    for line in (server:request "/mistakes" or server:log()):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.matches("body must be a string", lines[1])
    assert.matches("unknown option 'rooting_key' %(did you mean 'routing_key'%?%)", lines[2])
    assert.matches("option 'routing_key' must be a string", lines[3])
    assert.matches("headers", lines[4])
    assert.matches("option 'timeout' must be a number of seconds", lines[5])
    assert.matches("start belongs into init_worker_by_lua%*, and was called in access_by_lua%*", lines[6])
    assert.matches("consume belongs into init_worker_by_lua%*", lines[7])
    assert.matches("unknown option 'runtime'", lines[8])
    assert.matches("Connection:call: unknown option 'reply_to'", lines[9])
    assert.matches("resty.call: opts must be a table", lines[10])
    assert.matches("resty.publisher: .*table", lines[11])
    assert.matches("resty.publisher: unknown option 'rooting_key'", lines[12])
    assert.matches("resty.connect: a URI or a table of options expected", lines[13])
    assert.matches("resty.run: fn must be a function", lines[14])
    -- And says where it was made.
    local here = "^access_by_lua%(nginx.conf:%d+%):%d+: "
    assert.matches(here .. "moonrabbit.resty.publish: the body must be a string", lines[15])
    assert.matches(here .. "Publisher:send_async: unknown option 'rooting_key'", lines[16])
  end)

  it("says in which phase nothing can wait", function()
    server:request "/mistakes"
    for _, name in ipairs { "publish", "connect", "call", "run", "request_body" } do
      server:logged("in log: false [^\n]*resty." .. name .. " waits, which is impossible in log_by_lua%*")
    end
    assert.matches("publish_async is for every phase", server:log())
    server:logged "publish: [^\n]*waits, which is impossible in init_worker_by_lua%*"
  end)

  it("says at the start what is wrong with the options", function()
    for _, text in ipairs { "twice: [^\n]*start was called before", "unknown option 'url' %(did you mean 'uri'%?%)",
      "invalid AMQP URI: ", "lua_ssl_trusted_certificate", "lua_ssl_protocols", "'tls.cert' and 'tls.key' go together",
      "tls.cert: /nowhere.pem: No such file", "'entries' must be", "reconnect: unknown option 'frist'",
      "reconnect: option 'jitter' must be a number from 0 to 1",
      "unknown option 'runtime'", "sites.standby is missing", "consume: [^\n]*option 'handler' is missing",
      "consume: [^\n]*unknown option 'queue'", "start: [^\n]*tls: unknown option 'verfy'",
      "start: [^\n]*sites.primary: tls: unknown option 'srever_name'" } do
      assert.matches(text, server:log())
    end
  end)

  it("leaves no error in the log but those", function()
    assert.is_nil(server:log():find("%[alert%]"), server:log())
    assert.is_nil(server:log():find("error in a task"), server:log())
  end)
end)

describe("the queue of a worker #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local server, channel, queue

  -- A linger that no spec lives to see the end of.
  before_each(function()
    channel = ok(broker.connect():channel())
    queue = broker.unique "nginx"
    ok(channel:queue_declare(queue, { durable = true }))
    server = nginx.start {
      http = [[
        init_worker_by_lua_block {
          require "moonrabbit.resty".start { uri = os.getenv "AMQP_URL", entries = 100, bytes = 10000, linger = 1000 }
        }
      ]],
      server = locations .. [[
        location /mixed {
          content_by_lua_block {
            local rabbit = require "moonrabbit.resty"
            for i = 1, 40 do
              local key = i % 2 == 0 and ngx.var.arg_queue or "no-such-queue"
              assert(rabbit.publish_async("m" .. i, { routing_key = key }))
            end
            ngx.say(rabbit.publish("last", { routing_key = ngx.var.arg_queue }) and "ok")
          }
        }
        location /large {
          content_by_lua_block {
            local rabbit = require "moonrabbit.resty"
            for _ = 1, 3 do assert(rabbit.publish_async(("x"):rep(2500), { routing_key = ngx.var.arg_queue })) end
            ngx.say "ok"
          }
        }
      ]],
    }
    server:ready "/ping"
    assert.equal("ok\n", (server:request("/publish?queue=" .. queue, { body = "first" })))
  end)

  after_each(function()
    server:stop()
    channel:queue_delete(queue)
    broker.close_all()
  end)

  local function stats() return cjson.decode((server:request "/stats")) end

  local function come_to(confirmed)
    broker.eventually(function() return stats().confirmed == confirmed end, 10, confirmed .. " confirmed")
  end

  it("lets messages gather, until somebody waits for one", function()
    assert.equal("ok\n", (server:request("/many?n=5&queue=" .. queue)))
    assert.equal(5, stats().queued)
    assert.equal("ok\n", (server:request("/publish?queue=" .. queue, { body = "x" })))
    come_to(7)
  end)

  it("lets none gather in a queue that is half full, of messages or of bytes", function()
    assert.equal("ok\n", (server:request("/many?n=100&queue=" .. queue)), server:log())
    come_to(101)
    assert.equal("ok\n", (server:request("/large?queue=" .. queue)), server:log())
    come_to(104)
    -- Nor when it becomes so only while they gather.
    assert.equal("ok\n", (server:request("/many?n=20&queue=" .. queue)))
    assert.equal(20, stats().queued)
    assert.equal("ok\n", (server:request("/many?n=20&queue=" .. queue)))
    assert.equal(40, stats().queued)
    assert.equal("ok\n", (server:request("/many?n=20&queue=" .. queue)))
    come_to(164)
  end)

  it("is empty once all is settled, in whatever order", function()
    for round = 1, 5 do
      assert.equal("ok\n", (server:request("/mixed?queue=" .. queue)), server:log())
      come_to(1 + round * 21)
    end
    local now
    broker.eventually(function()
      now = stats()
      return now.queued == 0 and now.in_flight == 0
    end, 10, "all is settled")
    assert.equal(100, now.failed.unroutable)
    assert.equal(0, now.bytes)
    -- Nor does the worker stay for anything.
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
  end)
end)

describe("dedupe.shared #resty", function()
  if nginx.missing() then pending(nginx.missing()) return end

  it("knows what is new, running and done, in a dictionary of all workers", function()
    local server = nginx.start {
      http = "lua_shared_dict seen 64k;",
      server = [[
        location /seen {
          content_by_lua_block {
            local dedupe = require "moonrabbit".dedupe or require "moonrabbit.app.dedupe"
            local store = dedupe.shared { dict = "seen", prefix = "a:", ttl = 60 }
            local function say(...) ngx.say(table.concat({ ... }, " ")) end
            say(store:begin("k", 10), store:begin("k", 10), tostring(store:commit "k"), store:begin("k", 10))
            say(store:begin("j", 10), tostring(store:abort "j"), store:begin("j", 0.05))
            ngx.sleep(0.1)
            say(store:begin("j", 10), dedupe.shared({ dict = "seen", prefix = "b:" }):begin("k", 10))
            local state, err
            for i = 1, 5000 do
              state, err = store:begin(("x"):rep(100) .. i, 10)
              if not state then break end
            end
            say(tostring(state), err.kind, store:begin("k", 10))
            say(select(2, pcall(dedupe.shared, { dict = "none" })))
            say(select(2, pcall(store.begin, store, "k", 0)))
          }
        }
      ]],
    }
    local lines = {}
    for line in (server:request "/seen" or server:log()):gmatch "[^\n]+" do lines[#lines + 1] = line end
    server:stop()
    assert.equal("new running true done", lines[1])
    assert.equal("new true new", lines[2])
    assert.equal("new new", lines[3])
    assert.equal("nil overflow done", lines[4])
    assert.matches("there is no dictionary 'none': nginx needs `lua_shared_dict none 10m;`", lines[5])
    assert.matches("the lease must be more than 0", lines[6])
  end)
end)

describe("a wrong configuration #resty", function()
  if nginx.missing() then pending(nginx.missing()) return end

  -- What nginx says of a configuration that it must not start with.
  local function refused(http)
    local started, err = pcall(nginx.start, { http = http })
    if started then err:stop() end
    assert.is_false(started)
    return err
  end

  it("keeps nginx from starting when init_by_lua checks it", function()
    assert.matches("option 'entries' must be an integer",
      refused [[init_by_lua_block { require "moonrabbit.resty".check { uri = "amqp://localhost/", entries = "x" } }]])
    nginx.start({ http = [[init_by_lua_block { require "moonrabbit.resty".check "amqp://localhost/" }]] }):stop()
  end)

  it("is told that start is not for init_by_lua", function()
    assert.matches("start belongs into init_worker_by_lua%*, and was called in init_by_lua%*",
      refused [[init_by_lua_block { require "moonrabbit.resty".start "amqp://localhost/" }]])
  end)

  it("is told that nothing can be published there, or asked", function()
    for _, call in ipairs { 'publish "x"', 'publish_async "x"', 'call "x"', "run(print)" } do
      assert.matches("call moonrabbit.resty.start in init_worker_by_lua%* first %(this is init_by_lua%*%)",
        refused(([[init_by_lua_block { require "moonrabbit.resty".%s }]]):format(call)))
    end
    assert.matches("connect waits, which is impossible in init_by_lua%*",
      refused [[init_by_lua_block { require "moonrabbit.resty".connect "amqp://" }]])
    assert.matches("consume belongs into init_worker_by_lua%*, and was called in init_by_lua%*",
      refused [[init_by_lua_block { require "moonrabbit.resty".consume { app = "x.lua" } }]])
  end)

  it("is told about lua_code_cache off, and about no start at all", function()
    local location = [[
      location /publish {
        content_by_lua_block { ngx.say(select(2, pcall(require "moonrabbit.resty".publish, "x"))) }
      }
    ]]
    local server = nginx.start {
      http = "lua_code_cache off;\n" ..
        'init_worker_by_lua_block { require "moonrabbit.resty".start "amqp://127.0.0.1:1/" }',
      server = location,
    }
    local answer = server:request "/publish"
    server:request "/publish"
    local _, warnings = server:log():gsub("%[warn%][^\n]*moonrabbit: lua_code_cache is off", "")
    local text = server:log()
    server:stop()
    assert.matches("lua_code_cache is off", answer, 1, text)
    assert.equal(1, warnings, text)
    server = nginx.start { server = location }
    answer = server:request "/publish"
    server:stop()
    assert.matches("call moonrabbit.resty.start in init_worker_by_lua%* first %(this is content_by_lua%*%)", answer)
  end)

  it("is told where moonrabbit.resty runs", function()
    assert.has_error(function() require "moonrabbit.resty" end,
      'moonrabbit.resty runs inside nginx with ngx_lua (OpenResty): elsewhere use require "moonrabbit"')
  end)
end)
