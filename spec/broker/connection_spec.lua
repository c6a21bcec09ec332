-- Connecting and ending, against a real broker.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local process = require "support.process"
local ok = broker.ok

describe("connection", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  after_each(broker.close_all)

  it("opens, knows its server, and closes", function()
    local conn = broker.connect { name = "spec", client_properties = { team = "specs" } }
    assert.equal("open", (conn:state()))
    assert.is_true(conn:is_open())
    local server = conn:server()
    assert.equal("RabbitMQ", server.product)
    assert.matches("^%d+%.%d+", server.version)
    assert.is_true(server.properties.capabilities.publisher_confirms)
    assert.truthy(server.channel_max > 0 and server.frame_max >= 4096 and server.heartbeat > 0)
    assert.truthy(tostring(conn):find("guest@", 1, true))
    assert.is_nil(tostring(conn):find("guest:guest", 1, true))
    assert.is_true(ok(conn:close()))
    local state, reason = conn:state()
    assert.equal("closed", state)
    assert.equal("closed", reason.kind)
    assert.is_false(reason.temporary)
    assert.is_true(conn:close())
    local ch, err = conn:channel()
    assert.is_nil(ch)
    assert.equal("closed", err.kind)
    assert.equal(broker.parsed().host .. ":" .. broker.parsed().port, err.endpoint)
  end)

  it("takes a URI alone, AMQPLAIN, a password function, and options over the URI", function()
    ok(ok(moonrabbit.connect(broker.url)):close())
    broker.connect { mechanism = "AMQPLAIN" }
    local asked = 0
    broker.connect { uri = broker.uri { password = "wrong" }, password = function()
      asked = asked + 1
      return broker.parsed().password or "guest"
    end }
    assert.equal(1, asked)
    local conn, err = moonrabbit.connect { uri = broker.url,
      password = function() return nil, "the vault is sealed" end }
    assert.is_nil(conn)
    assert.equal("auth", err.kind)
    assert.matches("the vault is sealed", err.message)
  end)

  it("tunes what it is asked to", function()
    local conn = broker.connect { heartbeat = 7, frame_max = 8192, channel_max = 3 }
    local server = conn:server()
    assert.equal(7, server.heartbeat)
    assert.equal(8192, server.frame_max)
    assert.equal(3, server.channel_max)
    for _ = 1, 3 do ok(conn:channel()) end
    local ch, err = conn:channel()
    assert.is_nil(ch)
    assert.equal("overflow", err.kind)
  end)

  it("uses IPv6", function()
    local url = os.getenv "AMQP_URL_IPV6"
    if not url then pending "no IPv6 here" return end
    assert.matches("^%[::1%]:", broker.connect({ uri = url }).endpoint)
  end)

  it("tries endpoints in order", function()
    local conn = broker.connect { endpoints = { "amqp://127.0.0.1:1/", broker.url } }
    assert.truthy(conn:is_open())
    local none, err = moonrabbit.connect { endpoints = { "amqp://127.0.0.1:1/", "amqp://127.0.0.1:2/" } }
    assert.is_nil(none)
    assert.equal("refused", err.kind)
    assert.equal("127.0.0.1:2", err.endpoint)
  end)

  it("is refused where nothing listens", function()
    local conn, err = moonrabbit.connect "amqp://127.0.0.1:1/"
    assert.is_nil(conn)
    assert.equal("refused", err.kind)
    assert.is_true(err.temporary)
    assert.equal("127.0.0.1:1", err.endpoint)
  end)

  it("says when a name has no address", function()
    local conn, err = moonrabbit.connect { uri = "amqp://no-such-host.invalid/", connect_timeout = 8 }
    assert.is_nil(conn)
    assert.truthy(err.kind == "dns" or err.kind == "timeout", err.kind)
  end)

  it("says that the password is wrong, without showing it", function()
    local conn, err = moonrabbit.connect(broker.uri { password = "s3cr3t-wrong" })
    assert.is_nil(conn)
    assert.equal("auth", err.kind)
    assert.equal(403, err.code)
    assert.is_false(err.temporary)
    assert.matches("ACCESS_REFUSED", err.message)
    for _, value in pairs(err) do assert.is_nil(tostring(value):find("s3cr3t", 1, true)) end
  end)

  it("says that the vhost is unknown", function()
    local conn, err = moonrabbit.connect(broker.uri { vhost = "no such vhost" })
    assert.is_nil(conn)
    assert.equal("vhost", err.kind)
    assert.is_false(err.temporary)
  end)

  it("says that the user may not use the vhost, or not do this", function()
    if not broker.name then pending "the broker is not ours" return end
    local user = broker.unique "user"
    broker.ctl("add_user", user, "pass-of-user")
    local conn, err = moonrabbit.connect(broker.uri { user = user, password = "pass-of-user" })
    assert.is_nil(conn)
    assert.equal("vhost", err.kind)
    broker.ctl("set_permissions", user, "^$", "^$", "^$")
    conn = broker.connect { uri = broker.uri { user = user, password = "pass-of-user" } }
    local ch = ok(conn:channel())
    local declared
    declared, err = ch:queue_declare(broker.unique "q")
    assert.is_nil(declared)
    assert.equal("channel", err.kind)
    assert.equal(403, err.code)
    assert.is_true(conn:is_open())
    broker.ctl("delete_user", user)
    -- The broker closes the connections of a deleted user.
    broker.eventually(function() return not conn:is_open() end, 10, "closed by the broker")
    local _, reason = conn:state()
    assert.truthy(reason.kind == "closed" or reason.kind == "auth" or reason.kind == "vhost", reason.kind)
  end)

  it("reports its end to whoever listens", function()
    local conn = broker.connect()
    local seen = {}
    local off = conn:on("closed", function(err) seen.closed = err end)
    conn:on("state", function(state) seen[#seen + 1] = state end)
    off()
    conn:on("closed", function(err) seen.closed_again = err end)
    ok(conn:close())
    broker.eventually(function() return #seen >= 2 and seen.closed_again end)
    assert.same({ "closing", "closed" }, { seen[1], seen[2] })
    assert.is_nil(seen.closed)
    assert.equal("closed", seen.closed_again.kind)
    assert.has_error(function() conn:on("close", print) end)
    assert.has_error(function() conn:on("closed", "x") end)
  end)

  it("delivers later events although a listener throws", function()
    local logged = {}
    local conn = broker.connect { log = function(level, text)
      if level == "error" then logged[#logged + 1] = text end
    end }
    local closed
    conn:on("state", function() error "boom" end)
    conn:on("closed", function() closed = true end)
    ok(conn:close())
    broker.eventually(function() return closed end)
    assert.matches("boom", logged[1])
  end)

  it("learns that the broker closed it", function()
    if not broker.name then pending "the broker is not ours" return end
    local conn = broker.connect { name = broker.unique "victim", reconnect = false }
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    local consumer = ok(ch:consume(queue))
    broker.ctl("close_all_connections", "because of a spec")
    local message, err = consumer:receive(10)
    assert.is_nil(message)
    assert.equal("closed", err.kind)
    assert.equal(320, err.code)
    assert.is_true(err.temporary)
    assert.matches("because of a spec", err.message)
    assert.equal(err, consumer:reason())
    local sent
    sent, err = ch:publish("x", { routing_key = queue })
    assert.is_nil(sent)
    assert.equal("closed", err.kind)
  end)

  it("refreshes its secret", function()
    local conn = broker.connect()
    local done, err = conn:update_secret("guest", { reason = "spec" })
    -- Without an OAuth backend some versions take it and others do not.
    if not done then assert.truthy(err.kind) end
    assert.has_error(function() conn:update_secret(7) end)
  end)

  it("flushes and batches", function()
    local conn = broker.connect()
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    assert.is_true(ok(conn:batch(function()
      for i = 1, 100 do ok(ch:publish_async(("x"):rep(2000) .. i, { routing_key = queue })) end
    end)))
    assert.is_true(ok(conn:flush()))
    assert.is_true(ok(ch:wait_for_confirms(10)))
    assert.equal(100, ok(ch:queue_declare(queue, { passive = true })).message_count)
  end)

  it("closes when 5.4's to-be-closed variable ends", function()
    if _VERSION ~= "Lua 5.4" then pending "Lua 5.4 only" return end
    local outer
    assert(load [[
      local connect, keep = ...
      do
        local conn <close> = connect()
        keep(conn)
      end]])(broker.connect, function(conn) outer = conn end)
    assert.is_false(outer:is_open())
    broker.eventually(function() return (outer:state()) == "closed" end)
  end)

  it("holds its heartbeats while nothing happens", function()
    local conn = broker.connect { heartbeat = 1, reconnect = false }
    moonrabbit.sleep(3.5) -- the broker hangs up after two intervals without a sign of life, or three
    assert.is_true(conn:is_open())
    ok(conn:channel())
  end)

  it("survives a task that keeps the loop away for longer than the heartbeat", function()
    local conn = broker.connect { heartbeat = 3, reconnect = false, log = function() end }
    process.sleep(5) -- and the broker hangs up after six at the earliest
    moonrabbit.sleep(0.2)
    assert.is_true(conn:is_open(), tostring(select(2, conn:state())))
    ok(conn:channel())
  end)

  it("holds many channels and connections", function()
    local conn = broker.connect()
    local list = {}
    for i = 1, 200 do list[i] = ok(conn:channel()) end
    for i = 1, 200 do ok(list[i]:close()) end
    local conns = {}
    for i = 1, 20 do conns[i] = broker.connect() end
    for i = 1, 20 do assert.is_true(conns[i]:is_open()) end
  end)

  it("connects and works from many tasks at once", function()
    moonrabbit.run(function()
      local conn = broker.connect()
      local done = 0
      for i = 1, 50 do
        moonrabbit.spawn(function()
          local ch = ok(conn:channel())
          local name = ok(ch:queue_declare("", { exclusive = true, arguments = { ["x-max-length"] = i } })).queue
          assert(name ~= "")
          ok(ch:queue_delete(name))
          ok(ch:close())
          done = done + 1
        end)
      end
      broker.eventually(function() return done == 50 end)
    end)
  end)

  it("delivers many events without holding up the loop", function()
    local conn = broker.connect()
    local n, ticks = 0, 0
    moonrabbit.run(function()
      conn:on("state", function() n = n + 1 end)
      for _ = 1, 50000 do conn:_event("state", "x") end
      moonrabbit.spawn(function()
        while n < 50000 do
          moonrabbit.sleep(0)
          ticks = ticks + 1
        end
      end)
      broker.eventually(function() return n == 50000 end, 5)
    end)
    assert.truthy(ticks > 100, ticks .. " ticks")
  end)

  it("takes the port of amqps with tls, whatever the password looks like", function()
    local _, err = moonrabbit.connect { uri = "amqp://guest:5672@127.0.0.1/", tls = { verify = false },
      connect_timeout = 1 }
    assert.equal("127.0.0.1:5671", err.endpoint)
  end)
end)
