-- What is at the other end is no broker, or goes away.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local proxy = require "support.proxy"
local native = require "moonrabbit.runtime.native"
local scripted = require "support.scripted"
local fake = require "support.fake_broker"
local ok = broker.ok

describe("network", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local through

  before_each(function() through = proxy.start(broker.parsed().host, broker.parsed().port) end)
  after_each(function()
    broker.close_all()
    through:stop()
  end)

  local function connect_through(opts)
    opts = opts or {}
    opts.uri = broker.uri { host = "127.0.0.1", port = through.port }
    return broker.connect(opts)
  end

  it("a port that speaks HTTP is a protocol error", function()
    local port, stop = proxy.serve(function(transport)
      transport:read(100)
      transport:write "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
      transport:read(100)
    end)
    local conn, err = moonrabbit.connect("amqp://127.0.0.1:" .. port .. "/")
    stop()
    assert.is_nil(conn)
    assert.equal("protocol", err.kind)
    assert.is_false(err.temporary)
    assert.equal("127.0.0.1:" .. port, err.endpoint)
  end)

  it("a broker of another protocol version is a protocol error", function()
    local port, stop = proxy.serve(function(transport)
      transport:read(100)
      transport:write "AMQP\0\1\0\0"
      transport:close()
    end)
    local conn, err = moonrabbit.connect("amqp://127.0.0.1:" .. port .. "/")
    stop()
    assert.is_nil(conn)
    assert.equal("protocol", err.kind)
  end)

  it("a port that says nothing times out in time", function()
    local port, stop = proxy.serve(function(transport) while transport:read(100) do end end) -- luacheck: ignore 542
    local started = native.now()
    local conn, err = moonrabbit.connect { uri = "amqp://127.0.0.1:" .. port .. "/", connect_timeout = 0.5 }
    stop()
    assert.is_nil(conn)
    assert.equal("timeout", err.kind)
    assert.is_true(err.temporary)
    assert.matches("0.5 s", err.message)
    assert.truthy(native.now() - started < 2)
  end)

  it("a port that hangs up is closed", function()
    local port, stop = proxy.serve(function(transport) transport:close() end)
    local conn, err = moonrabbit.connect("amqp://127.0.0.1:" .. port .. "/")
    stop()
    assert.is_nil(conn)
    assert.equal("closed", err.kind)
    assert.is_true(err.temporary)
  end)

  it("random bytes are a protocol error or an end, never more", function()
    local seed = 42
    local function random(n)
      seed = (seed * 16807) % 2147483647
      return seed % n
    end
    local port, stop = proxy.serve(function(transport)
      local bytes = {}
      for i = 1, 500 do bytes[i] = string.char(random(256)) end
      transport:write(table.concat(bytes))
      transport:close()
    end)
    for _ = 1, 20 do
      local conn, err = moonrabbit.connect { uri = "amqp://127.0.0.1:" .. port .. "/", connect_timeout = 2 }
      assert.is_nil(conn)
      assert.truthy(err.kind == "protocol" or err.kind == "closed", err.kind .. ": " .. err.message)
    end
    stop()
  end)

  it("a broker that falls silent is noticed by the heartbeat", function()
    local conn = connect_through { heartbeat = 1, reconnect = false }
    local ch = ok(conn:channel())
    through.silent = true
    local started = native.now()
    local result, err = ch:queue_declare("", { exclusive = true, timeout = 20 })
    assert.is_nil(result)
    assert.equal("timeout", err.kind)
    assert.matches("heartbeat", err.message)
    assert.truthy(native.now() - started < 6)
    assert.equal("closed", (conn:state()))
  end)

  it("a call that gets no answer times out, and a late answer is dropped", function()
    local conn = connect_through { heartbeat = 0 }
    local ch = ok(conn:channel())
    through.silent = false
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    -- An answer that comes after its caller gave up must not be taken for the next one's.
    local first, err = ch:queue_declare(queue, { passive = true, timeout = 0 })
    assert.is_nil(first)
    assert.equal("timeout", err.kind)
    assert.equal(0, ok(ch:queue_purge(queue)))
    local _
    _, err = ch:get(queue, { timeout = 0 })
    assert.equal("timeout", err.kind)
    assert.equal(queue, ok(ch:queue_declare(queue, { passive = true })).queue)
  end)

  it("a message that answers a get nobody waits for goes back", function()
    local conn = connect_through()
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    ok(ch:publish("x", { routing_key = queue }))
    local message, err = ch:get(queue, { timeout = 0 })
    assert.is_nil(message)
    assert.equal("timeout", err.kind)
    broker.eventually(function()
      local again = ch:get(queue)
      if again then again:ack() end
      return again
    end)
  end)

  it("a cut line ends everything that waits with closed", function()
    local conn = connect_through { reconnect = false }
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    ok(ch:publish("one", { routing_key = queue }))
    local consumer = ok(ch:consume(queue))
    local message = ok(consumer:receive(5))
    local results = {}
    moonrabbit.run(function()
      through.silent = true
      local confirmation = ok(ch:publish_async("two", { routing_key = queue }))
      local waiting = 0
      local function start(name, fn)
        waiting = waiting + 1
        moonrabbit.spawn(function()
          results[name] = { fn() }
          waiting = waiting - 1
        end)
      end
      start("publish", function() return ch:publish("three", { routing_key = queue }) end)
      start("wait", function() return confirmation:wait() end)
      start("all", function() return ch:wait_for_confirms() end)
      start("receive", function() return consumer:receive() end)
      start("declare", function() return ch:queue_declare("x") end)
      start("channel", function() return conn:channel() end)
      moonrabbit.sleep(0.05)
      through:cut()
      broker.eventually(function() return waiting == 0 end)
    end)
    for _, name in ipairs { "publish", "wait", "all", "receive", "declare", "channel" } do
      assert.is_nil(results[name][1], name)
      assert.equal("closed", results[name][2].kind, name)
      assert.is_true(results[name][2].temporary, name)
      assert.truthy(results[name][2].endpoint, name)
    end
    assert.equal(2, results.all[2].pending)
    -- The message of the connection that is gone: harmless.
    local acked, err = message:ack()
    assert.is_nil(acked)
    assert.equal("closed", err.kind)
    acked, err = message:nack()
    assert.is_nil(acked)
    assert.equal("closed", err.kind)
  end)

  it("close does not wait for ever", function()
    local conn = connect_through()
    through.silent = true
    local started = native.now()
    local closed, err = conn:close(0.3)
    assert.is_nil(closed)
    assert.equal("timeout", err.kind)
    assert.equal("closed", (conn:state()))
    assert.truthy(native.now() - started < 2)
  end)

  it("a channel whose opening times out leaves nothing behind", function()
    local conn = connect_through()
    local ch, err = conn:channel { timeout = 0 }
    assert.is_nil(ch)
    assert.equal("timeout", err.kind)
    for _ = 1, 5 do ok(ok(conn:channel { confirm = true, prefetch = 5 }):close()) end
  end)

  it("a consumer whose start times out does not keep messages", function()
    local conn = connect_through()
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    ok(ch:publish("x", { routing_key = queue }))
    local consumer, err = ch:consume(queue, { timeout = 0 })
    assert.is_nil(consumer)
    assert.equal("timeout", err.kind)
    broker.eventually(function()
      local message = ok(ch:get(queue))
      if message then message:ack() end
      return message
    end)
  end)

  describe("with a broker that follows a script", function()
    local other

    before_each(function() other = scripted.start() end)

    local function connect(opts)
      opts = opts or {}
      opts.uri, opts.runtime = "amqp://127.0.0.1/", other.runtime
      return broker.connect(opts)
    end

    it("ends a connection whose reader throws, instead of hanging", function()
      for text, kind in pairs { ["not enough memory"] = "overflow", ["something else"] = "closed" } do
        other.throw = nil
        local logged
        local conn = connect { reconnect = false,
          log = function(level, line) if level == "error" then logged = line end end }
        local ch = ok(conn:channel { confirm = true })
        local results = {}
        moonrabbit.run(function()
          moonrabbit.spawn(function() results[1] = { ch:queue_declare("x", { timeout = 10 }) } end)
          moonrabbit.spawn(function() results[2] = { ch:publish("x", { timeout = 10 }) } end)
          moonrabbit.sleep(0.02)
          other.throw = text
          other.more:broadcast()
          broker.eventually(function() return results[1] and results[2] and logged end, 5)
        end)
        for i = 1, 2 do
          assert.is_nil(results[i][1])
          assert.equal(kind, results[i][2].kind)
          assert.matches(text, results[i][2].message)
        end
        assert.equal("closed", (conn:state()))
        assert.matches(text, logged)
        assert.is_nil((ch:publish_async "y"))
      end
    end)

    it("survives a log that throws", function()
      local stderr, written = io.stderr, {}
      io.stderr = { write = function(_, ...) written[#written + 1] = table.concat { ... } end } -- luacheck: ignore 122
      local good, err = pcall(function()
        local conn = connect { log = function() error "no log" end }
        local ch = ok(conn:channel())
        ok(ch:consume "q")
        ok(conn:close(5))
      end)
      io.stderr = stderr -- luacheck: ignore 122
      assert.is_true(good, tostring(err))
      assert.matches("no log", table.concat(written))
    end)

    it("calls a close without the broker's answer no success", function()
      other.answers["10.50"] = false
      local conn = connect()
      local closed, err
      moonrabbit.run(function()
        moonrabbit.spawn(function()
          broker.eventually(function() return other.heard[#other.heard] == "10.50" end)
          other:cut()
        end)
        closed, err = conn:close(5)
      end)
      assert.is_nil(closed)
      assert.equal("closed", err.kind)
      assert.equal("closed", (conn:state()))
      assert.is_true(conn:close())
    end)

    it("leaves nothing behind when the task of a call is cancelled", function()
      local conn = connect()
      local ch = ok(conn:channel())
      local get = {}
      other.answers["60.70"] = function() get[#get + 1] = true return "" end
      moonrabbit.run(function()
        local task = moonrabbit.spawn(function() ch:get "q" end)
        broker.eventually(function() return #get == 1 end)
        native.cancel(task)
        moonrabbit.sleep(0.01)
        assert(conn._session.awaiting == 0)
        other:say(fake.method(1, 60, 71, fake.u64(1) .. fake.u8(0) .. fake.short "" .. fake.short "q" .. fake.u32(0))
          .. fake.content(1, "x"))
        -- Back it goes.
        broker.eventually(function() return other.heard[#other.heard] == "60.120" end)
      end)
      assert.equal(0, ch:unsettled())
    end)

    it("is held back by a listener that is slower, and answers come all the same", function()
      for size, most in pairs { [10] = 5000, [100000] = 250 } do
        local conn = connect()
        local ch = ok(conn:channel())
        local returned = fake.returned(1, ("x"):rep(size), {})
        local sent, heard, open, total = 0, 0, false, most * 2
        other.flood = function()
          if sent == total then return nil end
          sent = sent + 1
          return returned
        end
        moonrabbit.run(function()
          local gate = native.condition()
          ch:on("return", function()
            while not open do gate:wait() end
            heard = heard + 1
          end)
          other.more:broadcast()
          broker.eventually(function() return conn._session.paused end)
          local held = sent
          assert(held < most, held)
          ok(ch:qos(10)) -- its answer comes
          assert(sent < most, sent)
          open = true
          gate:broadcast()
          broker.eventually(function() return heard == total end, 60)
        end)
        ok(conn:close(5))
        other = scripted.start()
      end
    end)

    it("leaves nothing behind when a call may not wait where it is made", function()
      local conn = connect()
      local ch = ok(conn:channel())
      other.transport.check_owner = function() error("not in this loop", 0) end
      moonrabbit.run(function()
        local waited, text = moonrabbit.pcall(ch.get, ch, "q")
        assert(not waited and text == "not in this loop")
      end)
      other.transport.check_owner = nil
      assert.equal(0, conn._session.awaiting)
    end)

    it("leaves nothing behind when the task that connects, opens or calls first is cancelled", function()
      local conn = connect()
      moonrabbit.run(function()
        other.answers["20.10"], other.answers["85.10"] = false, false
        local task = moonrabbit.spawn(function() conn:channel() end)
        broker.eventually(function() return other.heard[#other.heard] == "20.10" end)
        native.cancel(task)
        moonrabbit.sleep(0.01)
        other:say(fake.method(1, 20, 11, fake.long ""))
        broker.eventually(function() return other.heard[#other.heard] == "20.40" end)

        task = moonrabbit.spawn(function() conn:call("x", { routing_key = "q" }) end)
        broker.eventually(function() return other.heard[#other.heard] ~= "20.40" end)
        native.cancel(task)
        moonrabbit.sleep(0.01)
        local started = native.now()
        local reply, err = conn:call("x", { routing_key = "q", timeout = 0.2 })
        assert(not reply and err.kind == "timeout")
        assert(native.now() - started < 3) -- not the 15 s of the connection

        other = scripted.start()
        other.answers["10.40"] = false
        task = moonrabbit.spawn(connect)
        broker.eventually(function() return other.heard[#other.heard] == "10.40" end)
        local transport = other.transport
        assert(not transport.closed)
        native.cancel(task)
        broker.eventually(function() return transport.closed end, 5)
      end)
    end)

    it("takes one timeout for the start of the replies and the call", function()
      local conn = connect()
      local mine = other
      other.answers["85.10"] = function(frame)
        moonrabbit.spawn(function()
          moonrabbit.sleep(1.5)
          mine:say(fake.method(frame.channel, 85, 11))
        end)
        return ""
      end
      other.answers["60.20"] = false
      local started = native.now()
      local reply, err = conn:call("x", { routing_key = "q", timeout = 2.5 })
      assert.is_nil(reply)
      assert.equal("timeout", err.kind)
      assert.truthy(native.now() - started < 3.9) -- two would be 4 s
    end)

    it("forgets a request that could not be made", function()
      local conn = connect()
      moonrabbit.run(function()
        assert(not moonrabbit.pcall(conn.call, conn, "x", { routing_key = "q", headers = { a = print } }))
      end)
      assert.is_nil(next(conn._rpc._replies.by_id))
    end)

    it("reports a turn that is too long for the heartbeat, and where", function()
      local logged
      local conn = connect { heartbeat = 1, log = function(level, text)
        -- Where the machine stops this process, other turns may be long too.
        if level == "warn" and text:find "network_spec.lua:%d+" then logged = text end
      end }
      conn._session.heartbeat = 0.4
      assert.is_nil(logged)
      moonrabbit.run(function()
        moonrabbit.spawn(function()
          local till = native.now() + 0.3
          repeat until native.now() > till
        end)
        broker.eventually(function() return logged end)
      end)
      assert.matches("stood still", logged)
      ok(conn:close(5))
      assert.is_nil(native.long_turn)
    end)

    it("repeats neither the old secret nor the new one from the broker", function()
      other.answers["10.70"] = function()
        return fake.method(0, 10, 50, fake.u16(530) .. fake.short "old-secret, then new-secret" .. fake.u32(0))
      end
      local conn = broker.connect { uri = "amqp://user:old-secret@127.0.0.1/", runtime = other.runtime }
      local updated, err = conn:update_secret "new-secret"
      assert.is_nil(updated)
      assert.equal(530, err.code)
      assert.matches("%*%*%*, then %*%*%*", err.message)
    end)
  end)
end)
