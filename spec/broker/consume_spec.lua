-- Consumers, settling, handlers.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local fake = require "support.fake_broker"
local scripted = require "support.scripted"
local native = require "moonrabbit.runtime.native"
local ok = broker.ok

describe("consuming", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local conn, ch, queue

  before_each(function()
    conn = broker.connect()
    ch = ok(conn:channel { confirm = true })
    queue = ok(ch:queue_declare("", { exclusive = true })).queue
  end)
  after_each(broker.close_all)

  local function fill(n, prefix)
    for i = 1, n do ok(ch:publish_async((prefix or "m") .. i, { routing_key = queue })) end
    ok(ch:wait_for_confirms(20))
  end

  local function left() return ok(ch:queue_declare(queue, { passive = true })).message_count end

  it("iterates in a plain script", function()
    fill(500)
    local consumer = ok(ch:consume(queue, { prefetch = 50 }))
    assert.equal(50, consumer.prefetch)
    local n = 0
    for message in consumer:messages() do
      n = n + 1
      assert.equal("m" .. n, message.body)
      assert.equal("", message.exchange)
      assert.equal(queue, message.routing_key)
      assert.equal(consumer.tag, message.consumer_tag)
      assert.equal(ch, message.channel)
      assert.is_false(message.redelivered)
      assert.equal(n, message.delivery_tag)
      assert.is_true(message:ack())
      if n == 500 then break end
    end
    assert.is_true(ok(consumer:cancel()))
    assert.equal("cancelled", consumer:reason().kind)
    assert.is_false(consumer:reason().temporary)
    assert.equal(0, left())
    assert.equal(0, ch:unsettled())
  end)

  it("receives within a timeout", function()
    local consumer = ok(ch:consume(queue))
    local message, err = consumer:receive(0)
    assert.is_nil(message)
    assert.equal("timeout", err.kind)
    local started = native.now()
    message, err = consumer:receive(0.1)
    assert.is_nil(message)
    assert.equal("timeout", err.kind)
    assert.truthy(native.now() - started >= 0.09)
    fill(1)
    message = ok(consumer:receive(5))
    assert.is_true(message:ack())
    assert.is_nil(consumer:reason())
  end)

  it("shares one consumer among tasks that receive", function()
    moonrabbit.run(function()
      local consumer = ok(ch:consume(queue, { prefetch = 10 }))
      local got = {}
      for i = 1, 5 do
        moonrabbit.spawn(function()
          while #got < 200 do
            local message = consumer:receive(0.2)
            if message then
              got[#got + 1] = message.body
              if i % 2 == 0 then moonrabbit.sleep(0) end
              message:ack()
            end
          end
        end)
      end
      fill(200)
      broker.eventually(function() return #got == 200 end)
      local seen = {}
      for _, body in ipairs(got) do
        assert(not seen[body])
        seen[body] = true
      end
    end)
  end)

  it("obeys the prefetch", function()
    fill(100)
    local consumer = ok(ch:consume(queue, { prefetch = 7 }))
    broker.eventually(function() return consumer:buffered() == 7 end)
    moonrabbit.sleep(0.1)
    assert.equal(7, consumer:buffered())
    assert.equal(7, ch:unsettled())
    assert.equal(93, left())
    for _ = 1, 3 do ok(consumer:receive(5)):ack() end
    broker.eventually(function() return left() == 90 end)
    broker.eventually(function() return ch:unsettled() == 7 end) -- the answer may come before the deliveries
    assert.equal(7, consumer:buffered())
  end)

  it("chooses a prefetch where nobody did, and says which", function()
    local said = {}
    local other = broker.connect { log = function(level, text) said[#said + 1] = level .. ": " .. text end }
    local consumer = ok(ok(other:channel()):consume("amq.rabbitmq.reply-to", { no_ack = true }))
    assert.equal(0, consumer.prefetch)
    local own = ok(ch:queue_declare(broker.unique "q", { auto_delete = true })).queue
    consumer = ok(ok(other:channel()):consume(own))
    assert.equal(250, consumer.prefetch)
    assert.matches("info: consumer on '.*': no prefetch given, using 250", table.concat(said, "\n"))
    assert.equal(30, ok(ok(other:channel { prefetch = 30 }):consume(own)).prefetch)
    assert.equal(0, ok(ok(other:channel { prefetch = 30 }):consume(own, { prefetch = 0 })).prefetch)
  end)

  it("takes no_ack consumers without losing a message to slowness", function()
    fill(10000, ("x"):rep(100))
    local consumer = ok(ch:consume(queue, { no_ack = true }))
    local n = 0
    for message in consumer:messages() do
      n = n + 1
      if n == 1 then
        moonrabbit.sleep(0.3)
        -- An answer of the broker comes although the consumer's messages wait in front of it.
        assert.equal(queue, ok(ch:queue_declare(queue, { passive = true })).queue)
        assert.has_error(function() message:ack() end)
      end
      if n == 10000 then break end
    end
    assert.is_false((pcall(consumer.receive, consumer, "x")))
    assert.equal(0, left())
  end)

  it("cancels: what came and was not taken goes back", function()
    fill(20)
    local consumer = ok(ch:consume(queue, { prefetch = 10 }))
    local first = ok(consumer:receive(5))
    broker.eventually(function() return consumer:buffered() == 9 end)
    assert.is_true(ok(ch:cancel(consumer)))
    assert.is_true(consumer:cancel())
    assert.equal(0, consumer:buffered())
    assert.is_true(first:ack())
    broker.eventually(function() return left() == 19 end)
    local message, err = consumer:receive(1)
    assert.is_nil(message)
    assert.equal("cancelled", err.kind)
    for _ in consumer:messages() do error "none" end
  end)

  it("cancels with drain: what came can still be taken", function()
    fill(20)
    local consumer = ok(ch:consume(queue, { prefetch = 10 }))
    broker.eventually(function() return consumer:buffered() == 10 end)
    assert.is_true(ok(consumer:cancel { drain = true }))
    local n = 0
    for message in consumer:messages() do
      n = n + 1
      message:ack()
    end
    assert.equal(10, n)
    broker.eventually(function() return left() == 10 end)
  end)

  it("ends when its queue is deleted, and says that the broker did it", function()
    fill(3)
    local consumer = ok(ch:consume(queue))
    local cancelled
    ch:on("cancel", function(which) cancelled = which end)
    local n = 0
    local other = ok(conn:channel())
    for message in consumer:messages() do
      n = n + 1
      message:ack()
      if n == 3 then ok(other:queue_delete(queue)) end
    end
    assert.equal(3, n)
    assert.equal("cancelled", consumer:reason().kind)
    assert.is_true(consumer:reason().temporary)
    broker.eventually(function() return cancelled end)
    assert.equal(consumer, cancelled)
    assert.is_true(ch:is_open())
  end)

  it("ends with its channel, where nothing is to come back", function()
    conn = broker.connect { reconnect = false }
    ch = ok(conn:channel { confirm = true })
    queue = ok(ch:queue_declare("", { exclusive = true })).queue
    fill(5)
    local consumer = ok(ch:consume(queue, { prefetch = 5 }))
    local message = ok(consumer:receive(5))
    ch:queue_declare("no-such-queue", { passive = true })
    local none, err = consumer:receive(5)
    assert.is_nil(none)
    assert.equal(404, err.code)
    assert.equal(err, consumer:reason())
    local acked
    acked, err = message:ack()
    assert.is_nil(acked)
    assert.equal("closed", err.kind)
    assert.equal(404, err.code)
    acked, err = ch:ack(message)
    assert.is_nil(acked)
    assert.equal("closed", err.kind)
  end)

  it("says no to an exclusive consumer beside another, and to an unknown queue", function()
    local name = ok(ch:queue_declare(broker.unique "q", { auto_delete = true })).queue
    local first = ok(ok(conn:channel()):consume(name, { exclusive = true, tag = "mine" }))
    assert.equal("mine", first.tag)
    local second, err = ok(conn:channel()):consume(name)
    assert.is_nil(second)
    assert.equal(403, err.code)
    second, err = conn:consume "no-such-queue"
    assert.is_nil(second)
    assert.equal(404, err.code)
    assert.has_error(function() first.channel:consume(name, { tag = "mine" }) end)
    assert.has_error(function() ch:consume(queue, { noack = true }) end)
    assert.has_error(function() ch:consume(queue, {}, "handler") end)
    assert.has_error(function() ch:consume(nil) end)
  end)

  it("prefers consumers of higher priority", function()
    local high = ok(ch:consume(queue, { priority = 10, prefetch = 5 }))
    local low = ok(ok(conn:channel()):consume(queue, { priority = 1, prefetch = 5 }))
    fill(5)
    broker.eventually(function() return high:buffered() == 5 end)
    assert.equal(0, low:buffered())
  end)

  describe("settling", function()
    local consumer

    local function take(n)
      local list = {}
      for i = 1, n do list[i] = ok(consumer:receive(5)) end
      return list
    end

    before_each(function()
      fill(20)
      consumer = ok(ch:consume(queue, { prefetch = 100 }))
    end)

    it("mixes acks, nacks and rejects, single and multiple", function()
      local m = take(20)
      m[2]:ack()
      m[4]:nack { requeue = false }
      m[6]:reject()
      ok(ch:ack(m[1].delivery_tag))
      ok(ch:ack(m[8], { multiple = true }))          -- 3 5 7 8
      ok(ch:nack(m[12], { multiple = true, requeue = false })) -- 9 to 12
      m[20]:ack()
      m[14]:ack()
      m[13]:nack { requeue = false }
      ok(ch:reject(m[15]))
      assert.equal(4, ch:unsettled())
      ok(ch:ack(0, { multiple = true }))
      assert.equal(0, ch:unsettled())
      ok(consumer:cancel())
      assert.equal(0, left())
      assert.is_true(ch:is_open())
    end)

    it("requeues", function()
      local m = take(20)
      m[1]:nack()
      m[2]:reject { requeue = true }
      ok(ch:nack(m[3], { requeue = true }))
      local again = {}
      for _ = 1, 3 do
        local message = ok(consumer:receive(5))
        assert.is_true(message.redelivered)
        again[#again + 1] = message.body
        message:ack()
      end
      table.sort(again)
      assert.same({ "m1", "m2", "m3" }, again)
    end)

    it("throws for a second time, naming the delivery, and sends nothing", function()
      local m = take(3)
      m[1]:ack()
      m[2]:nack { requeue = false }
      m[3]:reject()
      for i = 1, 3 do
        for _, method in ipairs { "ack", "nack", "reject" } do
          local good, message = pcall(function() local r = m[i][method](m[i]) return r end)
          assert.is_false(good)
          assert.matches("delivery " .. i .. " was settled before", message)
          assert.matches("consume_spec.lua:", message)
        end
        assert.is_false((pcall(ch.ack, ch, m[i].delivery_tag)))
      end
      assert.has_error(function() m[1]:nack { requeu = true } end)
      left() -- a second ack would have closed the channel before this is answered
      assert.is_true(ch:is_open())
    end)

    it("dead-letters what is rejected", function()
      local dead = ok(ch:queue_declare("", { exclusive = true })).queue
      local from = ok(ch:queue_declare("", { exclusive = true,
        arguments = { ["x-dead-letter-exchange"] = "", ["x-dead-letter-routing-key"] = dead } })).queue
      ok(ch:publish("poison", { routing_key = from }))
      ok(ch:get(from)):reject()
      local message = broker.eventually(function() return ok(ch:get(dead)) end)
      assert.equal("poison", message.body)
      assert.equal("rejected", message.headers["x-death"][1].reason)
      assert.equal(1, message.headers["x-death"][1].count)
      message:ack()
    end)
  end)

  it("acks really leave: nothing comes back after the connection is gone", function()
    local name = broker.unique "q"
    ok(ch:queue_declare(name))
    for i = 1, 30 do ok(ch:publish("m" .. i, { routing_key = name })) end
    local other = broker.connect()
    local consumer = ok(ok(other:channel()):consume(name, { prefetch = 20 }))
    for _ = 1, 4 do ok(consumer:receive(5)):ack() end -- fewer than what leaves at once, a quarter of the prefetch
    broker.eventually(function() return consumer:buffered() == 20 end, 10, "the broker has got the acks")
    other._session.transport:close()
    broker.eventually(function() return ok(ch:queue_declare(name, { passive = true })).message_count == 26 end)
    ok(ch:queue_delete(name))
  end)

  describe("with a handler", function()
    it("runs at most so many at once, and uses its tasks again", function()
      local running, most, done, tasks = 0, 0, 0, {}
      local consumer = ok(conn:consume(queue, { prefetch = 50, concurrency = 8 }, function(message)
        running = running + 1
        most = math.max(most, running)
        tasks[native.current()] = true
        repeat moonrabbit.sleep(0.001) until most >= 8 -- the first eight wait for one another
        running = running - 1
        message:ack()
        done = done + 1
      end))
      assert.equal(8, consumer.concurrency)
      fill(200)
      broker.eventually(function() return done == 200 end)
      assert.equal(8, most)
      local n = 0
      for _ in pairs(tasks) do n = n + 1 end
      assert.equal(8, n)
      assert.has_error(function() consumer:receive() end)
      assert.has_error(function() consumer:messages() end)
      ok(consumer:cancel())
      assert.is_false(consumer.channel:is_open())
      assert.equal(0, left())
    end)

    it("handles in order with a concurrency of one", function()
      local order = {}
      local consumer = ok(ch:consume(queue, { concurrency = 1 }, function(message)
        if #order % 3 == 0 then moonrabbit.sleep(0) end
        order[#order + 1] = message.body
        message:ack()
      end))
      fill(100)
      broker.eventually(function() return #order == 100 end)
      for i = 1, 100 do assert(order[i] == "m" .. i) end
      ok(consumer:cancel())
    end)

    it("reports what a handler throws, and gives the message back a little later", function()
      local reported, tries = {}, 0
      conn:on("error", function(text, message) reported[#reported + 1] = { text, message } end)
      local consumer = ok(ch:consume(queue, { error_delay = 0.05 }, function(message)
        tries = tries + 1
        if tries == 1 then error "boom in the handler" end
        if tries == 2 then error({ code = 7 }) end -- luacheck: ignore
        if tries == 3 then
          message:ack()
          error "after the ack"
        end
      end))
      fill(1)
      broker.eventually(function() return #reported == 3 end)
      assert.matches("boom in the handler", reported[1][1])
      assert.matches("consume_spec.lua", reported[1][1])
      if _VERSION ~= "Lua 5.1" or rawget(_G, "jit") then assert.matches("traceback", reported[1][1]) end
      assert.equal("m1", reported[1][2].body)
      assert.matches("error object is a table", reported[2][1])
      assert.matches("after the ack", reported[3][1])
      moonrabbit.sleep(0.1)
      assert.equal(3, tries)
      assert.is_true(ch:is_open())
      ok(consumer:cancel())
      assert.equal(0, left())
    end)

    it("drains on demand", function()
      local done = 0
      local consumer = ok(ch:consume(queue, { prefetch = 10, concurrency = 3 }, function(message)
        moonrabbit.sleep(0.01)
        message:ack()
        done = done + 1
      end))
      fill(10)
      broker.eventually(function() return done >= 1 end)
      ok(consumer:cancel { drain = true, timeout = 10 })
      assert.equal(10, done)
      assert.equal(0, left())
    end)

    it("can publish and declare from handlers", function()
      local out = ok(ch:queue_declare("", { exclusive = true })).queue
      local consumer = ok(conn:consume(queue, { prefetch = 20 }, function(message)
        assert(ch:publish(message.body .. "!", { routing_key = out }))
        assert(message:ack())
      end))
      fill(50)
      broker.eventually(function() return ok(ch:queue_declare(out, { passive = true })).message_count == 50 end)
      ok(consumer:cancel())
    end)
  end)

  it("settles nothing of its own for a message of another channel", function()
    fill(4)
    local other = ok(conn:channel())
    local theirs = ok(ok(other:consume(queue, { prefetch = 1 })):receive(5))
    local mine = ok(ok(ch:consume(queue, { prefetch = 1 })):receive(5))
    assert.equal(theirs.delivery_tag, mine.delivery_tag)
    for _, method in ipairs { "ack", "nack", "reject" } do
      local good, message = pcall(ch[method], ch, theirs)
      assert.is_false(good)
      assert.matches("another channel", message)
    end
    assert.equal(1, ch:unsettled())
    assert.equal(1, other:unsettled())
    ok(other:close())
    for _, method in ipairs { "ack", "nack", "reject" } do
      local settled, err = ch[method](ch, theirs)
      assert.is_nil(settled)
      assert.equal("closed", err.kind)
    end
    assert.equal(1, ch:unsettled())
    assert.is_true(ok(ch:ack(mine)))
  end)

  it("lets a call time out, and others run, while more comes than a consumer takes", function()
    local other = scripted.start()
    local line = broker.connect { uri = "amqp://127.0.0.1/", runtime = other.runtime }
    local channel = ok(line:channel())
    ok(channel:consume("q", { no_ack = true, tag = "t" }))
    local chunk, fed = fake.deliver(1, "t", 1, ("x"):rep(60000)), 0
    local ticks, result = 0, nil
    moonrabbit.run(function()
      other.flood = function()
        fed = fed + #chunk
        return fed < 500e6 and chunk or nil
      end
      other.more:signal()
      local ticking = moonrabbit.spawn(function()
        while true do
          moonrabbit.sleep(0.01)
          ticks = ticks + 1
        end
      end)
      result = { channel:queue_declare("x", { timeout = 1.5 }) }
      native.cancel(ticking)
    end)
    other.flood = nil
    assert.is_nil(result[1])
    assert.equal("timeout", result[2].kind)
    assert.truthy(ticks >= 5, ticks .. " ticks")
    assert.truthy(fed < 150e6, fed .. " bytes read")
    line:close(0.1)
  end)

  it("does not wait for itself when its own handler cancels it", function()
    fill(1)
    local consumer, took, result
    moonrabbit.run(function()
      consumer = ok(conn:consume(queue, { prefetch = 1 }, function(message)
        message:ack()
        local started = native.now()
        result = { consumer:cancel { drain = true, timeout = 5 } }
        took = native.now() - started
      end))
      broker.eventually(function() return took end)
      broker.eventually(function() return not consumer.channel:is_open() end)
    end)
    assert.is_true(result[1])
    assert.truthy(took < 2)
    assert.equal(0, left())
  end)

  it("lets go of a channel of its own, and forgets what was cancelled", function()
    fill(3)
    local begun, handled, cancelling = 0, 0, false
    local consumer = ok(conn:consume(queue, { prefetch = 3 }, function(message)
      begun = begun + 1
      repeat moonrabbit.sleep(0.05) until cancelling
      assert(message:ack())
      handled = handled + 1
    end))
    broker.eventually(function() return begun == 3 end)
    cancelling = true
    ok(consumer:cancel()) -- the acks of those that run come first
    assert.equal(3, handled)
    assert.is_false(consumer.channel:is_open())
    assert.equal(0, left())

    consumer = ok(conn:consume(queue, {}, function(message) message:ack() end))
    ok(consumer:cancel { drain = true })
    assert.is_false(consumer.channel:is_open())

    fill(2)
    consumer = ok(conn:consume(queue, { prefetch = 2 }))
    broker.eventually(function() return consumer:buffered() == 2 end)
    ok(consumer:cancel { drain = true })
    assert.is_true(consumer.channel:is_open())
    for message in consumer:messages() do message:ack() end
    assert.is_false(consumer.channel:is_open())
    assert.equal(0, left())

    for _ = 1, 5 do ok(ok(ch:consume(queue)):cancel()) end
    assert.is_nil(next(ch._receivers))

    consumer = ok(conn:consume(queue, {}, function(message) message:ack() end))
    ok(ch:queue_delete(queue))
    broker.eventually(function() return not consumer.channel:is_open() end)
  end)

  it("gives a consumer's prefetch to no other, and qos to those that start before its answer", function()
    ok(ch:consume(queue, { prefetch = 7 }))
    assert.equal(250, ok(ch:consume(queue)).prefetch)
    local other = ok(conn:channel { prefetch = 9 })
    ok(other:consume(queue, { prefetch = 3 }))
    assert.equal(9, ok(other:consume(queue)).prefetch)
    moonrabbit.run(function()
      moonrabbit.spawn(function() ok(ch:qos(10)) end)
      moonrabbit.sleep(0)
      assert(ok(ch:consume(queue)).prefetch == 10)
    end)
  end)
end)
