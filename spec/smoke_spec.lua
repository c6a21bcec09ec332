-- The main path in a few lines: what every Lua must do, 5.1 to 5.4 and LuaJIT.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local ok = broker.ok

describe("smoke #smoke", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  after_each(broker.close_all)

  it("publishes, confirms, consumes and acks in a plain script", function()
    local conn = broker.connect()
    local ch = ok(conn:channel { confirm = true, prefetch = 20 })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    assert.is_true(ch:publish("m1", { routing_key = queue, headers = { n = 1 }, message_id = "id" }))
    local sent, err = ch:publish("lost", { routing_key = "no-such-queue" })
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
    for i = 2, 100 do ok(ch:publish_async("m" .. i, { routing_key = queue })) end
    assert.is_true(ch:wait_for_confirms(10))
    local consumer = ok(ch:consume(queue))
    local n = 0
    for message in consumer:messages() do
      n = n + 1
      assert.equal("m" .. n, message.body)
      if n == 1 then assert.equal(1, message.headers.n) end
      assert.is_true(message:ack())
      if n == 100 then break end
    end
    assert.has_error(function() ch:ack(1) end)
    ok(consumer:cancel())
    assert.equal(0, ok(ch:queue_declare(queue, { passive = true })).message_count)
    assert.is_true(ok(conn:close()))
  end)

  it("does the same in tasks, with handlers, calls and a pool", function()
    moonrabbit.run(function()
      local conn = broker.connect()
      local ch = ok(conn:channel { confirm = true })
      local queue = ok(ch:queue_declare(broker.unique "smoke", { auto_delete = true })).queue
      local failed
      conn:on("error", function(text) failed = text end)
      ok(conn:consume(queue, { prefetch = 10, error_delay = 0 }, function(message)
        moonrabbit.sleep(0.001)
        if message.body == "throw" and not message.redelivered then error "thrown" end
        if message.properties.reply_to then ok(message:reply(message.body .. "!")) end
        message:ack()
      end))
      local replies = 0
      for i = 1, 20 do
        moonrabbit.spawn(function()
          assert(ok(conn:call("c" .. i, { routing_key = queue })).body == "c" .. i .. "!")
          replies = replies + 1
        end)
      end
      broker.eventually(function() return replies == 20 end)
      ok(ch:publish("throw", { routing_key = queue }))
      broker.eventually(function() return failed end)
      assert.matches("thrown", failed)
      local pool = moonrabbit.pool { connect = broker.url, channels = 2 }
      local done = 0
      for _ = 1, 6 do
        moonrabbit.spawn(function()
          ok(pool:with(function(channel) return channel:publish("p", { routing_key = queue }) end))
          done = done + 1
        end)
      end
      broker.eventually(function() return done == 6 end)
      ok(pool:close())
      -- PUC 5.1 cannot yield inside a generic for: receive is for its tasks.
      local own = ok(ch:queue_declare("", { exclusive = true })).queue
      ok(ch:publish("r", { routing_key = own }))
      local consumer = ok(ch:consume(own))
      ok(consumer:receive(5)):ack()
      local none, err = consumer:receive(0.05)
      assert.is_nil(none)
      assert.equal("timeout", err.kind)
      ok(conn:close())
    end)
  end)

  it("says what is wrong", function()
    local conn, err = moonrabbit.connect(broker.uri { password = "wrong" })
    assert.is_nil(conn)
    assert.equal("auth", err.kind)
    conn, err = moonrabbit.connect "amqp://127.0.0.1:1/"
    assert.is_nil(conn)
    assert.equal("refused", err.kind)
    assert.has_error(function() moonrabbit.connect { usr = "x" } end)
  end)
end)
