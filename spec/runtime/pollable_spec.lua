-- Connections, consumers and confirmations as objects that cqueues.poll takes.
local broker = require "support.broker"
local loops = require "support.loops"
local moonrabbit = require "moonrabbit"
local ok = broker.ok

describe("objects that cqueues.poll takes #smoke", function()
  local reason = not loops.has "cqueues" and "cqueues is not installed" or broker.none()
  local it_polls = broker.it_unless(it, pending, reason)
  if reason then
    it_polls("are there", function() end)
    return
  end

  local cqueues = require "cqueues"
  local condition = require "cqueues.condition"
  local on = moonrabbit.on "cqueues"

  -- Runs fn(conn, ch, queue) in a cqueue, and closes.
  local function connected(fn, opts)
    local all = { uri = broker.url, timeout = 20, reconnect = false, log = function() end }
    for key, value in pairs(opts or {}) do all[key] = value end
    loops.run("cqueues", function()
      local conn = ok(on.connect(all))
      local ch = ok(conn:channel { confirm = true })
      -- What fails must not leave a connection, which would keep the loop.
      local fine, err = on.pcall(fn, conn, ch, ok(ch:queue_declare("", { exclusive = true })).queue)
      conn:close(5)
      if not fine then error(err, 0) end
    end)
  end

  -- How often `poll` returns while the loop runs for a moment. What is ready returns at once, again and again.
  local function wakes_of(object)
    local wakes, over = 0, condition.new()
    on.spawn(function()
      while cqueues.poll(object, over) == object do
        wakes = wakes + 1
        on.sleep(0)
      end
    end)
    for _ = 1, 20 do cqueues.sleep(0.002) end
    over:signal()
    cqueues.sleep(0)
    return wakes
  end

  it_polls("are consumers: ready while there is a message, and once they have ended", function()
    connected(function(conn, ch, queue)
      local consumer = ok(ch:consume(queue))
      assert.equal(0.01, cqueues.poll(consumer, 0.01))
      on.spawn(function()
        for i = 1, 2 do ok(ch:publish("m" .. i, { routing_key = queue })) end
      end)
      assert.equal(consumer, cqueues.poll(consumer, 20))
      assert.equal("m1", consumer:receive(0).body)
      assert.equal(consumer, cqueues.poll(consumer, 20))
      assert.equal(consumer, cqueues.poll(20, consumer)) -- it is still there
      assert.equal("m2", consumer:receive(0).body)
      assert.equal(0, wakes_of(consumer))
      on.spawn(function() ok(consumer:cancel()) end)
      assert.equal(consumer, cqueues.poll(consumer, 20))
      assert.equal("cancelled", select(2, consumer:receive(0)).kind)
      assert.equal(consumer, cqueues.poll(consumer, 20))
      assert.equal("open", conn:state())
    end)
  end)

  it_polls("are waited for beside conditions and sockets of the user's own", function()
    connected(function(_, ch, queue)
      local consumer, own = ok(ch:consume(queue)), condition.new()
      on.spawn(function()
        own:signal()
        cqueues.sleep(0.005)
        ok(ch:publish("m", { routing_key = queue }))
      end)
      assert.equal(own, cqueues.poll(consumer, own, 20))
      local one, other = require("cqueues.socket").pair()
      assert.equal(consumer, cqueues.poll(consumer, own, 20))
      other:write "x\n"
      other:flush()
      consumer:receive(0)
      local readable = { pollfd = one:pollfd(), events = "r" }
      assert.equal(readable, cqueues.poll(readable, consumer, 20))
      one:close()
      other:close()
    end)
  end)

  it_polls("are polled by several at once, and waited for by others", function()
    connected(function(conn, ch, queue)
      local consumer, ready, received = ok(ch:consume(queue)), 0, nil
      for _ = 1, 3 do
        on.spawn(function() if cqueues.poll(consumer, 20) == consumer then ready = ready + 1 end end)
      end
      on.spawn(function() received = ok(consumer:receive(20)) end)
      cqueues.sleep(0.01)
      ok(ch:publish("m", { routing_key = queue }))
      local deadline = cqueues.monotime() + 20
      while not (received and ready == 3) and cqueues.monotime() < deadline do cqueues.sleep(0.001) end
      assert.equal("m", received.body)
      assert.equal(3, ready)
      local ended
      on.spawn(function() ended = select(2, consumer:receive(20)) end)
      cqueues.sleep(0.01)
      conn:close(5)
      while not ended do cqueues.sleep(0.001) end
      assert.equal("closed", ended.kind)
    end)
  end)

  it_polls("are confirmations: ready once they are settled", function()
    connected(function(conn, ch, queue)
      for _, sender in ipairs { ch, ok(conn:publisher()) } do
        local send = sender.publish_async or sender.send_async
        local good = ok(send(sender, "m", { routing_key = queue }))
        assert.is_false(good:poll())
        assert.equal(good, cqueues.poll(good, 20))
        assert.is_true(good:poll())
        assert.equal(good, cqueues.poll(good, 20)) -- and stays so
        local bad = ok(send(sender, "m", { routing_key = "no-such-queue" }))
        assert.equal(bad, cqueues.poll(20, bad))
        assert.equal("unroutable", select(2, bad:poll()).kind)
      end
    end)
  end)

  it_polls("are confirmations that a task waits for too, each in its time", function()
    connected(function(_, ch, queue)
      local list, waited = {}, 0
      for i = 1, 50 do list[i] = ok(ch:publish_async("m", { routing_key = queue })) end
      for i = 1, 50 do
        on.spawn(function()
          assert.equal(list[i], cqueues.poll(list[i], 20))
          assert.is_true(list[i]:poll())
          waited = waited + 1
        end)
        on.spawn(function()
          ok(list[i]:wait(20))
          waited = waited + 1
        end)
      end
      while waited < 100 do cqueues.sleep(0.001) end
      assert.is_true(ok(ch:wait_for_confirms(20)))
    end)
  end)

  it_polls("are confirmations whose connection is lost", function()
    connected(function(conn, ch, queue)
      -- The line goes before the broker is asked.
      local confirmation = ok(ch:publish_async("m", { routing_key = queue }))
      on.spawn(function() conn._session:fail "cut by the spec" end)
      assert.equal(confirmation, cqueues.poll(confirmation, 20))
      assert.equal("closed", select(2, confirmation:poll()).kind)
      assert.equal(confirmation, cqueues.poll(confirmation, 20))
    end)
  end)

  it_polls("are connections: their state, and what comes for consumers that nobody waits on", function()
    connected(function(conn, ch, queue)
      local consumer = ok(ch:consume(queue))
      while cqueues.poll(conn, 0) == conn do end -- what was until here
      assert.equal(0.005, cqueues.poll(conn, 0.005))
      on.spawn(function() ok(ch:publish("m1", { routing_key = queue })) end)
      assert.equal(conn, cqueues.poll(conn, 20))
      assert.equal(conn, cqueues.poll(conn, 20)) -- the message is still there
      ok(consumer:receive(0)):ack()
      assert.equal(0, wakes_of(conn))

      on.spawn(function() conn._session:fail "cut by the spec" end)
      local states = {}
      repeat
        assert.equal(conn, cqueues.poll(conn, 20))
        states[#states + 1] = conn:state()
      until #states > 1 and conn:state() == "open"
      assert.equal("recovering", states[1])
      ok(ch:publish("m2", { routing_key = consumer.queue }))
      while consumer:buffered() == 0 do assert.equal(conn, cqueues.poll(conn, 20)) end
      assert.equal("m2", consumer:receive(0).body)

      on.spawn(function() conn:close(5) end)
      while conn:state() ~= "closed" do assert.equal(conn, cqueues.poll(conn, 20)) end
      assert.equal(conn, cqueues.poll(conn, 20)) -- for ever
    end, { reconnect = { first = 0.01 } })
  end)

  it_polls("are connections that tell what has changed while nobody polled them", function()
    connected(function(conn)
      while cqueues.poll(conn, 0) == conn do end -- what was until here
      conn._session:fail "cut by the spec"
      while conn:state() == "open" do cqueues.sleep(0.001) end
      ok(conn:wait_open(20))
      assert.equal(conn, cqueues.poll(conn, 20))
    end, { reconnect = { first = 0.01 } })
  end)

  it_polls("are connections that do not wake for the messages of another task", function()
    connected(function(conn, ch, queue)
      local consumer, got = ok(ch:consume(queue)), 0
      on.spawn(function()
        while ok(consumer:receive(20)).body ~= "last" do
          got = got + 1
          cqueues.sleep(0.01) -- the next ones wait meanwhile
        end
        got = got + 1
      end)
      cqueues.sleep(0)
      while cqueues.poll(conn, 0) == conn do end
      for _ = 1, 5 do ok(ch:publish("m", { routing_key = queue })) end
      assert.equal(0, wakes_of(conn))
      ok(ch:publish("last", { routing_key = queue }))
      while got < 6 do cqueues.sleep(0.001) end
    end)
  end)

  it_polls("are waited for from another cqueue, inside of which the connection's runs", function()
    local outer, inner, consumer, body, done = cqueues.new(), cqueues.new(), nil, nil, false
    inner:wrap(function()
      local conn = ok(on.connect { uri = broker.url, timeout = 20 })
      local ch = ok(conn:channel { confirm = true })
      local queue = ok(ch:queue_declare("", { exclusive = true })).queue
      consumer = ok(ch:consume(queue))
      cqueues.sleep(0.01)
      local confirmation = ok(ch:publish_async("across", { routing_key = queue }))
      outer:wrap(function() -- and then here, as if nobody had polled it elsewhere
        assert.equal(confirmation, cqueues.poll(confirmation, 20))
      end)
      cqueues.sleep(0)
      ok(confirmation:wait(20))
      while not body do cqueues.sleep(0.001) end
      conn:close(5)
      done = true
    end)
    outer:wrap(function()
      while not inner:empty() do
        cqueues.poll(inner)
        assert(inner:step(0))
      end
    end)
    outer:wrap(function()
      while not consumer do cqueues.sleep(0.001) end
      assert.equal(consumer, cqueues.poll(consumer, 20))
      body = consumer:receive(0).body
    end)
    assert(outer:loop())
    assert.is_true(done)
    assert.equal("across", body)
  end)

  -- How a cqueue is run by a coroutine of another one. None has a timeout: what is missed is missed for ever.
  local drivers = {
    ["by poll and step"] = function(inner)
      while not inner:empty() do
        cqueues.poll(inner)
        assert(inner:step(0))
      end
    end,
    ["by step"] = function(inner)
      while not inner:empty() do assert(inner:step()) end
    end,
    ["by loop"] = function(inner) assert(inner:loop()) end,
  }

  -- Publishes, and takes what was published, by polling alone; the connection may be another cqueue's.
  local function works_in(link, rounds)
    for i = 1, rounds do
      local confirmation = ok(link.ch:publish_async("m" .. i, { routing_key = link.queue }))
      while not confirmation:poll() do cqueues.poll(confirmation, i % 2 == 0 and link.conn or nil) end
      while link.consumer:buffered() == 0 do cqueues.poll(link.consumer, i % 3 == 0 and link.conn or nil) end
      local message = ok(link.consumer:receive(0))
      assert.equal("m" .. i, message.body)
      ok(message:ack())
    end
  end

  local function open_link()
    local conn = ok(on.connect { uri = broker.url, timeout = 20 })
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    return { conn = conn, ch = ch, queue = queue, consumer = ok(ch:consume(queue)) }
  end

  for name, drive in pairs(drivers) do
    it_polls("are waited for in three cqueues inside of one another, run " .. name, function()
      local all = { cqueues.new(), cqueues.new(), cqueues.new() }
      local links, left = {}, 9
      for i, cq in ipairs(all) do
        cq:wrap(function()
          links[i] = open_link()
          while left > 0 do cqueues.sleep(0.01) end
          ok(links[i].conn:close(5))
        end)
        if all[i + 1] then cq:wrap(drive, all[i + 1]) end
      end
      -- One after the other each of them works with the connection of each.
      for n = 0, 8 do
        local i, at = n % 3 + 1, math.floor(n / 3) + 1
        all[at]:wrap(function()
          while left ~= 9 - n or not links[i] do cqueues.sleep(0.001) end
          works_in(links[i], 20)
          left = left - 1
        end)
      end
      local deadline = cqueues.monotime() + 60
      while not all[1]:empty() and cqueues.monotime() < deadline do assert(all[1]:step(1)) end
      assert.equal(0, left)
      assert.is_true(all[1]:empty())
    end)
  end

  it_polls("are for calls that wait in their own cqueue only", function()
    local first, second, conn, err = cqueues.new(), cqueues.new(), nil, nil
    first:wrap(function() conn = ok(on.connect { uri = broker.url, timeout = 20 }) end)
    while not conn do assert(first:step(1)) end
    second:wrap(function() err = select(2, on.pcall(conn.channel, conn)) end)
    assert(second:loop())
    assert.matches("another cqueue", tostring(err))
    first:wrap(function() conn:close(5) end)
    assert(first:loop())
  end)

  it_polls("live in a controller that another loop runs, by its descriptor and timeout", function()
    local native = require "moonrabbit.runtime.native"
    local net = require "moonrabbit.net"
    local cq, body, turns = cqueues.new(), nil, 0
    cq:wrap(function()
      local conn = ok(on.connect { uri = broker.url, timeout = 20 })
      local ch = ok(conn:channel { confirm = true })
      local queue = ok(ch:queue_declare("", { exclusive = true })).queue
      local consumer = ok(ch:consume(queue))
      cqueues.sleep(0.05)
      ok(ch:publish("nested", { routing_key = queue }))
      assert.equal(consumer, cqueues.poll(consumer, 20))
      body = consumer:receive(0).body
      conn:close(5)
    end)
    local poller = net.poller()
    assert(poller:set(cq:pollfd(), cq:events()))
    local deadline = native.now() + 60
    while not cq:empty() and native.now() < deadline do
      local timeout = cq:timeout()
      poller:wait(timeout and math.min(timeout, 20) or 20)
      assert(cq:step(0))
      turns = turns + 1
    end
    assert.equal("nested", body)
    assert.truthy(turns < 1000, turns)
  end)

  it_polls("are none where they cannot be: with a handler, with another runtime", function()
    local function refused(object, text)
      local cq = cqueues.new()
      cq:wrap(function() cqueues.poll(object, 1) end)
      local fine, err = cq:loop()
      assert.is_falsy(fine)
      assert.matches(text, tostring(err))
    end
    connected(function(_, ch, queue)
      local consumer = ok(ch:consume(queue, function() end))
      refused(consumer, "Consumer:pollfd: this consumer has a handler")
    end)
    local conn = ok(moonrabbit.connect { uri = broker.url, timeout = 20 })
    refused(conn, "only with the runtime 'cqueues', and this is 'native'")
    local ch = ok(conn:channel { confirm = true })
    refused(ok(ch:consume(ok(ch:queue_declare("", { exclusive = true })).queue)), "Consumer:pollfd: cqueues can wait")
    local confirmation = ok(ch:publish_async("m", { routing_key = "none" }))
    refused(confirmation, "Confirmation:pollfd: cqueues can wait")
    conn:close(5)
  end)
end)
