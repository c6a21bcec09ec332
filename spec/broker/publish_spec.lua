-- Publishing and confirms.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local scripted = require "support.scripted"
local fake = require "support.fake_broker"
local ok = broker.ok

describe("publishing", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local conn, ch, queue

  before_each(function()
    conn = broker.connect()
    ch = ok(conn:channel { confirm = true })
    queue = ok(ch:queue_declare("", { exclusive = true })).queue
  end)
  after_each(broker.close_all)

  local function count(name) return ok(ch:queue_declare(name or queue, { passive = true })).message_count end

  it("is confirmed once a queue has the message", function()
    assert.is_true(ch:publish("hello", { routing_key = queue }))
    assert.equal(1, count())
    assert.equal(0, ch:unconfirmed())
  end)

  it("tells that no queue takes it, with the broker's code and text", function()
    local sent, err = ch:publish("hello", { routing_key = "no-such-queue" })
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
    assert.equal(312, err.code)
    assert.matches("NO_ROUTE", err.message)
    assert.is_false(err.temporary)
    assert.is_true(ch:publish("hello", { routing_key = "no-such-queue", mandatory = false }))
    assert.is_true(ch:publish("hello", { routing_key = queue }))
    assert.is_true(ch:is_open())
  end)

  it("hands returned messages to whoever listens", function()
    local returned, returned_at
    ch:on("return", function(message) returned = message end)
    conn:on("return", function(_, channel) returned_at = channel end)
    ch:publish("back", { routing_key = "no-such-queue", headers = { a = 1 } })
    broker.eventually(function() return returned and returned_at end)
    assert.equal("back", returned.body)
    assert.equal("no-such-queue", returned.routing_key)
    assert.equal(312, returned.reply_code)
    assert.equal("NO_ROUTE", returned.reply_text)
    assert.same({ a = 1 }, returned.headers)
    assert.equal(ch, returned_at)
    assert.has_error(function() returned:ack() end)
  end)

  it("goes out without waiting, and is waited for one by one or all together", function()
    local confirmations = {}
    for i = 1, 1000 do confirmations[i] = ok(ch:publish_async("m" .. i, { routing_key = queue })) end
    assert.equal("pending", confirmations[1000]:outcome())
    assert.is_false(confirmations[1000]:poll())
    assert.equal(1000, confirmations[1000]:seq())
    for i = 1000, 1, -7 do assert.is_true(confirmations[i]:wait()) end
    assert.is_true(ch:wait_for_confirms())
    assert.equal("acked", confirmations[1]:outcome())
    assert.is_true(confirmations[1]:poll())
    assert.equal(1000, count())
  end)

  it("reports every failure among many, each once", function()
    local bad = {}
    for i = 1, 100 do
      local key = i % 10 == 0 and "no-such-queue" or queue
      local confirmation = ok(ch:publish_async("m" .. i, { routing_key = key }))
      if i % 10 == 0 then bad[confirmation:seq()] = confirmation end
    end
    local all, err = ch:wait_for_confirms(10)
    assert.is_nil(all)
    assert.equal("unroutable", err.kind)
    assert.equal(10, #err.failed)
    for _, failure in ipairs(err.failed) do
      assert.equal("unroutable", failure.outcome)
      assert.equal("unroutable", failure.err.kind)
      assert.equal(312, failure.err.code)
      assert.truthy(bad[failure.seq])
      local acked, again = bad[failure.seq]:wait()
      assert.is_nil(acked)
      assert.equal(failure.err, again)
      assert.equal("unroutable", bad[failure.seq]:outcome())
    end
    assert.is_true(ch:wait_for_confirms(10))
    assert.equal(90, count())
  end)

  it("keeps a failure that publish returned out of wait_for_confirms", function()
    local sent = ch:publish("x", { routing_key = "no-such-queue" })
    assert.is_nil(sent)
    assert.is_true(ch:wait_for_confirms())
  end)

  it("tells a nack: a full queue that rejects", function()
    local full = ok(ch:queue_declare("", { exclusive = true,
      arguments = { ["x-max-length"] = 1, ["x-overflow"] = "reject-publish" } })).queue
    -- How many it takes before it says no differs between brokers.
    local err
    broker.eventually(function()
      local sent
      sent, err = ch:publish("x", { routing_key = full })
      return not sent
    end)
    assert.equal("nacked", err.kind)
    assert.is_true(err.temporary)
    for _ = 1, 50 do ch:publish_async("x", { routing_key = full }) end
    local all
    all, err = ch:wait_for_confirms(10)
    assert.is_nil(all)
    assert.equal("nacked", err.kind)
    assert.equal(50, #err.failed)
    assert.is_true(ch:publish("x", { routing_key = queue }))
  end)

  it("gives up after its timeout, the outcome unknown, and takes the late ack", function()
    local confirmation = ok(ch:publish_async("x", { routing_key = queue }))
    local acked, err = confirmation:wait(0)
    assert.is_nil(acked)
    assert.equal("timeout", err.kind)
    acked, err = ch:wait_for_confirms(0)
    assert.is_nil(acked)
    assert.equal("timeout", err.kind)
    assert.equal(1, err.pending)
    acked, err = ch:publish("y", { routing_key = queue, timeout = 0 })
    assert.is_nil(acked)
    assert.equal("timeout", err.kind)
    assert.is_true(confirmation:wait())
    assert.is_true(ch:wait_for_confirms())
    assert.equal(2, count())
  end)

  it("waits while the window is full, or says so", function()
    local narrow = ok(conn:channel { confirm = true, window = 10 })
    for _ = 1, 10 do ok(narrow:publish_async("x", { routing_key = queue })) end
    local confirmation, err = narrow:publish_async("x", { routing_key = queue, timeout = 0 })
    assert.is_nil(confirmation)
    assert.equal("overflow", err.kind)
    assert.is_true(err.temporary)
    local most = 0
    for _ = 1, 500 do
      ok(narrow:publish_async("x", { routing_key = queue }))
      most = math.max(most, narrow:unconfirmed())
    end
    assert.is_true(narrow:wait_for_confirms())
    assert.truthy(most <= 10)
    assert.equal(510, count())
  end)

  it("waits while the output buffer is full, or says so", function()
    local small = broker.connect { max_buffer = 100000 }
    local channel = ok(small:channel { confirm = true })
    local body = ("x"):rep(60000)
    local overflowed
    for _ = 1, 3 do -- with no turn of the loop between them, so the second or third finds the buffer full
      local confirmation, err = channel:publish_async(body, { routing_key = queue, timeout = 0 })
      overflowed = overflowed or not confirmation and err
    end
    assert.equal("overflow", overflowed.kind)
    for _ = 1, 100 do ok(channel:publish_async(body, { routing_key = queue })) end
    assert.is_true(channel:wait_for_confirms(20))
  end)

  it("serves thousands of tasks that wait on one channel", function()
    moonrabbit.run(function()
      local done, failed = 0, 0
      for i = 1, 3000 do
        moonrabbit.spawn(function()
          local sent, err = ch:publish("m" .. i, { routing_key = i % 100 == 0 and "no-such-queue" or queue })
          if sent then done = done + 1 elseif err.kind == "unroutable" then failed = failed + 1 end
        end)
      end
      broker.eventually(function() return done + failed == 3000 end, 30)
      assert.equal(30, failed)
    end)
    assert.equal(2970, count())
    assert.equal(0, ch:unconfirmed())
  end)

  it("serves tasks that share a narrow window", function()
    local narrow = ok(conn:channel { confirm = true, window = 5 })
    moonrabbit.run(function()
      local done = 0
      for i = 1, 300 do
        moonrabbit.spawn(function()
          if i % 2 == 0 then
            ok(narrow:publish("m" .. i, { routing_key = queue }))
          else
            assert(ok(narrow:publish_async("m" .. i, { routing_key = queue })):wait())
          end
          done = done + 1
        end)
      end
      broker.eventually(function() return done == 300 end, 20)
    end)
    assert.equal(300, count())
  end)

  it("lets two tasks wait for the same confirmation", function()
    moonrabbit.run(function()
      local confirmation = ok(ch:publish_async("x", { routing_key = queue }))
      local done = 0
      for _ = 1, 3 do
        moonrabbit.spawn(function()
          assert(confirmation:wait())
          done = done + 1
        end)
      end
      broker.eventually(function() return done == 3 end)
    end)
  end)

  it("sends bodies of any size", function()
    local frame_max = conn:server().frame_max
    local consumer = ok(ch:consume(queue))
    for _, size in ipairs { 0, 1, 4095, frame_max - 9, frame_max - 8, frame_max - 7, frame_max, 2 * (frame_max - 8),
      5 * 1024 * 1024 } do
      local body = ("0123456789abcdef"):rep(math.ceil(size / 16)):sub(1, size)
      ok(ch:publish(body, { routing_key = queue }))
      local message = ok(consumer:receive(10))
      assert.equal(size, #message.body)
      assert.is_true(message.body == body)
      message:ack()
    end
    local tiny = broker.connect { frame_max = 4096 }
    local small = ok(tiny:channel { confirm = true })
    for _, size in ipairs { 4087, 4088, 4089, 100000 } do
      local body = ("x"):rep(size)
      ok(small:publish(body, { routing_key = queue }))
      local message = ok(consumer:receive(10))
      assert.equal(size, #message.body)
      message:ack()
    end
  end)

  it("refuses what is too large before it sends a byte", function()
    local small = broker.connect { max_message_size = 1000 }
    local channel = ok(small:channel { confirm = true })
    ok(channel:publish(("x"):rep(1000), { routing_key = queue }))
    local sent, err = channel:publish(("x"):rep(1001), { routing_key = queue })
    assert.is_nil(sent)
    assert.equal("overflow", err.kind)
    assert.equal(311, err.code)
    assert.is_false(err.temporary)
    sent, err = ch:publish("x", { routing_key = queue, headers = { big = ("x"):rep(conn:server().frame_max) } })
    assert.is_nil(sent)
    assert.equal("overflow", err.kind)
    ok(ch:publish("x", { routing_key = queue }))
    assert.is_true(channel:is_open())
  end)

  it("throws for mistakes, naming them", function()
    local function complain(...)
      local args = { n = select("#", ...), ... }
      for _, method in ipairs { "publish", "publish_async" } do
        local good, message = pcall(function() return (ch[method](ch, args[1], args[2])) end)
        assert.is_false(good)
        if type(args[1]) == "string" then
          local key = next(args[2])
          assert.truthy(tostring(message):find(key, 1, true), message)
        end
      end
    end
    complain(nil, { routing_key = queue })
    complain(12, { routing_key = queue })
    complain({}, { routing_key = queue })
    complain("x", { routing_kay = queue })
    complain("x", { routing_key = ("x"):rep(256) })
    complain("x", { exchange = 5 })
    complain("x", { priority = 256 })
    complain("x", { mandatory = "yes" })
    complain("x", { headers = "none" })
    complain("x", { delivery_mode = 3 })
    local deep = {}
    for _ = 1, 100 do deep = { deep } end
    assert.is_false((pcall(ch.publish, ch, "x", { headers = { deep = deep } })))
    assert.equal(0, ch:unconfirmed())
    ok(ch:publish("x", { routing_key = queue }))
  end)

  it("loses its channel to an unknown exchange, and every waiter learns why", function()
    local results = {}
    moonrabbit.run(function()
      for i = 1, 5 do
        moonrabbit.spawn(function()
          results[i] = { ch:publish("x", { exchange = i == 3 and "no-such-exchange" or "", routing_key = queue }) }
        end)
      end
      broker.eventually(function() return #results == 5 end)
    end)
    local third = results[3]
    assert.is_nil(third[1])
    assert.equal("channel", third[2].kind)
    assert.equal(404, third[2].code)
    assert.matches("no%-such%-exchange", third[2].message)
    assert.is_false(ch:is_open())
    local all, err = ch:wait_for_confirms(1)
    assert.is_nil(all)
    assert.equal("channel", err.kind)
    local sent
    sent, err = ch:publish("x", { routing_key = queue })
    assert.is_nil(sent)
    assert.equal("channel", err.kind)
    sent, err = ch:publish_async("x", { routing_key = queue })
    assert.is_nil(sent)
    assert.equal(404, err.code)
    assert.is_true(conn:is_open())
  end)

  it("returns true at once on a channel without confirms", function()
    local plain = ok(conn:channel())
    assert.is_true(plain:publish("x", { routing_key = queue }))
    assert.is_true(plain:publish_async("x", { routing_key = queue }))
    assert.has_error(function() plain:wait_for_confirms() end)
    broker.eventually(function() return count() == 2 end)
  end)

  it("leaves with the next turn of the loop", function()
    local plain = ok(conn:channel())
    plain:publish_async("x", { routing_key = queue })
    moonrabbit.sleep(0.05)
    assert.equal(0, conn._session.engine:pending()) -- before `count` writes it
    broker.eventually(function() return count() == 1 end)
  end)

  it("is persistent and mandatory by default on a confirm channel, not elsewhere", function()
    ok(ch:publish("a", { routing_key = queue }))
    ok(ch:publish("b", { routing_key = queue, persistent = false }))
    ok(ch:publish("c", { routing_key = queue, delivery_mode = 1 }))
    ok(ok(conn:channel()):publish("d", { routing_key = queue }))
    local consumer = ok(ch:consume(queue))
    local modes = {}
    for _ = 1, 4 do
      local message = ok(consumer:receive(5))
      modes[message.body] = message.properties.delivery_mode or 1
      message:ack()
    end
    assert.same({ a = 2, b = 1, c = 1, d = 1 }, modes)
  end)

  it("is no slower for the second wait of a whole window", function()
    -- A window of confirms is settled by few frames: nothing here may be quadratic.
    local started = native.now()
    for _ = 1, 3 do
      for _ = 1, 20000 do ok(ch:publish_async("x", { routing_key = queue })) end
      ok(ch:wait_for_confirms(30))
    end
    assert.equal(60000, count())
    assert.truthy(native.now() - started < 30)
  end)

  describe("by a publisher", function()
    it("sends on a prepared route", function()
      local publisher = ok(conn:publisher { routing_key = queue, content_type = "text/plain",
        headers = { a = 1, b = 2 }, window = 100 })
      assert.is_true(publisher:send "one")
      assert.is_true(publisher:send("two", { headers = { b = 3 }, message_id = "id2" }))
      assert.is_true(ok(publisher:send_async "three"):wait())
      for i = 1, 500 do ok(publisher:send_async("m" .. i)) end
      assert.is_true(publisher:wait(10))
      assert.equal(0, publisher:unconfirmed())
      local consumer = ok(ch:consume(queue))
      local first = ok(consumer:receive(5))
      assert.equal("one", first.body)
      assert.equal("text/plain", first.properties.content_type)
      assert.equal(2, first.properties.delivery_mode)
      local second = ok(consumer:receive(5))
      assert.equal("id2", second.properties.message_id)
      assert.equal(1, second.headers.a)
      assert.equal(3, second.headers.b)
      ok(consumer:cancel())
      ok(publisher:close())
      local sent, err = publisher:send "after"
      assert.is_nil(sent)
      assert.equal("closed", err.kind)
    end)

    it("tells what fails", function()
      local publisher = ok(conn:publisher { routing_key = "no-such-queue" })
      local sent, err = publisher:send "x"
      assert.is_nil(sent)
      assert.equal("unroutable", err.kind)
      assert.is_true(publisher:send("x", { routing_key = queue }))
      publisher:send_async "x"
      sent, err = publisher:wait(5)
      assert.is_nil(sent)
      assert.equal(1, #err.failed)
    end)

    it("throws for what is no option", function()
      assert.has_error(function() conn:publisher { retries = 5 } end)
      assert.has_error(function() conn:publisher { window = -1 } end)
      local publisher = ok(conn:publisher { routing_key = queue })
      assert.has_error(function() publisher:send("x", { window = 5 }) end)
      assert.has_error(function() publisher:send(5) end)
    end)
  end)

  it("throws for options that are none", function()
    local good, message = pcall(ch.publish, ch, "x", 5)
    assert.is_false(good)
    assert.matches("opts", message)
  end)

  describe("to a broker that does not answer", function()
    local function open()
      local other = scripted.start()
      local line = broker.connect { uri = "amqp://127.0.0.1/", runtime = other.runtime }
      return ok(line:channel { confirm = true }), other, line
    end

    it("never calls what was lost confirmed", function()
      local channel = open()
      local confirmation = ok(channel:publish_async("x", { routing_key = "q" }))
      channel:__close()
      for _ = 1, 3 do
        local all, err = channel:wait_for_confirms(1)
        assert.is_nil(all)
        assert.equal("closed", err.kind)
        assert.equal(1, err.pending)
      end
      local acked, err = confirmation:wait(5)
      assert.is_nil(acked)
      assert.equal("closed", err.kind)
    end)

    it("tells everyone who waits when another task closes the channel", function()
      for _, close in ipairs { "__close", "close" } do
        local channel = open()
        local results, n = {}, 0
        moonrabbit.run(function()
          local function start(name, fn)
            moonrabbit.spawn(function()
              results[name] = { fn() }
              n = n + 1
            end)
          end
          local confirmation = ok(channel:publish_async("x", { routing_key = "q" }))
          local started = native.now()
          start("all", function() return channel:wait_for_confirms(10) end)
          start("all again", function() return channel:wait_for_confirms(10) end)
          start("one", function() return confirmation:wait(10) end)
          start("publish", function() return channel:publish("y", { routing_key = "q", timeout = 10 }) end)
          moonrabbit.sleep(0.02)
          channel[close](channel)
          broker.eventually(function() return n == 4 end, 5)
          assert(native.now() - started < 5)
        end)
        for name, result in pairs(results) do
          assert.is_nil(result[1], name)
          assert.equal("closed", result[2].kind, name)
        end
      end
    end)

    it("tells each task that waits for all of them of the same loss", function()
      local channel, other = open()
      local results = {}
      moonrabbit.run(function()
        channel:publish_async("x", { routing_key = "q" })
        for i = 1, 2 do moonrabbit.spawn(function() results[i] = { channel:wait_for_confirms(10) } end) end
        moonrabbit.sleep(0.02)
        other:cut()
        broker.eventually(function() return results[1] and results[2] end)
      end)
      assert.is_nil(results[1][1])
      assert.is_nil(results[2][1])
      assert.equal("closed", results[2][2].kind)
    end)

    it("tells each task that waits for all of them of the same nack", function()
      local channel, other = open()
      local results = {}
      moonrabbit.run(function()
        channel:publish_async("x", { routing_key = "q" })
        for i = 1, 2 do moonrabbit.spawn(function() results[i] = { channel:wait_for_confirms(10) } end) end
        moonrabbit.sleep(0.02)
        other:say(fake.nack(1, 1))
        broker.eventually(function() return results[1] and results[2] end)
      end)
      for i = 1, 2 do
        assert.is_nil(results[i][1])
        assert.equal("nacked", results[i][2].kind)
        assert.equal(1, #results[i][2].failed)
      end
      assert.is_true(channel:wait_for_confirms(1))
    end)

    it("knows that nothing is lost when all was confirmed before the end", function()
      local channel, other = open()
      channel:publish_async("x", { routing_key = "q" })
      moonrabbit.run(function()
        moonrabbit.sleep(0.01)
        other:say(fake.ack(1, 1))
        broker.eventually(function() return channel:unconfirmed() == 0 end)
        other:cut()
        broker.eventually(function() return not channel:is_open() end)
      end)
      assert.is_true(channel:wait_for_confirms(1))
    end)

    it("knows that something is lost when the confirms of others came with the end", function()
      local channel, other = open()
      channel:publish_async("x", { routing_key = "q" })
      channel:publish_async("y", { routing_key = "q" })
      moonrabbit.run(function()
        moonrabbit.sleep(0.01)
        other:say(fake.ack(1, 1) .. fake.method(1, 20, 40, fake.u16(404) .. fake.short "no" .. fake.u32(0)))
        broker.eventually(function() return not channel:is_open() end)
      end)
      local all, err = channel:wait_for_confirms(1)
      assert.is_nil(all)
      assert.equal("channel", err.kind)
    end)
  end)

  it("waits for room and for the confirm within one timeout", function()
    local other = scripted.start()
    local line = broker.connect { uri = "amqp://127.0.0.1/", runtime = other.runtime }
    local publisher = ok(line:publisher { routing_key = "q", window = 1, timeout = 2.5 })
    ok(publisher:send_async "x")
    moonrabbit.run(function()
      moonrabbit.spawn(function()
        moonrabbit.sleep(1.5)
        other:say(fake.ack(1, 1))
      end)
      local started = native.now()
      local sent, err = publisher:send "y"
      assert(not sent and err.kind == "timeout")
      assert(native.now() - started < 3.9) -- two would be 4 s
    end)
  end)
end)
