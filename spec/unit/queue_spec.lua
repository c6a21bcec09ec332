-- moonrabbit.queue: arguments of the kinds of queues.
local moonrabbit = require "moonrabbit"
local queue = moonrabbit.queue

describe("moonrabbit.queue", function()
  it("makes arguments of classic queues", function()
    assert.same({ durable = true, arguments = { ["x-queue-type"] = "classic" } }, queue.classic())
    assert.same({
      durable = false, exclusive = true, auto_delete = true,
      arguments = {
        ["x-queue-type"] = "classic", ["x-message-ttl"] = 1500, ["x-expires"] = 60000, ["x-max-length"] = 10,
        ["x-max-length-bytes"] = 1000, ["x-overflow"] = "reject-publish-dlx", ["x-dead-letter-exchange"] = "",
        ["x-dead-letter-routing-key"] = "dead", ["x-single-active-consumer"] = true, ["x-max-priority"] = 5,
        ["x-queue-mode"] = "lazy", ["x-queue-version"] = 2, ["x-mine"] = 1,
      },
    }, queue.classic {
      durable = false, exclusive = true, auto_delete = true, ttl = 1.5, expires = 60, max_length = 10, max_bytes = 1000,
      overflow = "reject-publish-dlx", dead_letter_exchange = "", dead_letter_routing_key = "dead",
      single_active_consumer = true, max_priority = 5, lazy = true, version = 2, arguments = { ["x-mine"] = 1 },
    })
  end)

  it("makes arguments of quorum queues and streams", function()
    assert.same({ durable = true, arguments = {
      ["x-queue-type"] = "quorum", ["x-delivery-limit"] = 3, ["x-quorum-initial-group-size"] = 3,
      ["x-dead-letter-exchange"] = "d", ["x-dead-letter-strategy"] = "at-least-once", ["x-overflow"] = "reject-publish",
    } }, queue.quorum { delivery_limit = 3, group_size = 3, dead_letter_exchange = "d", overflow = "reject-publish",
      dead_letter_strategy = "at-least-once" })
    assert.same({ durable = true, arguments = {
      ["x-queue-type"] = "stream", ["x-max-length-bytes"] = 1000000, ["x-max-age"] = "3600s",
      ["x-stream-max-segment-size-bytes"] = 100000, ["x-initial-cluster-size"] = 1,
      ["x-queue-leader-locator"] = "balanced",
    } }, queue.stream { max_bytes = 1000000, max_age = 3600, segment_bytes = 100000, group_size = 1,
      leader_locator = "balanced" })
  end)

  it("refuses what a kind cannot have, and what the broker would ignore, naming this line", function()
    for pattern, fn in pairs {
      ["unknown option 'max_priority'"] = function() queue.quorum { max_priority = 5 } end,
      ["unknown option 'exclusive'"] = function() queue.quorum { exclusive = true } end,
      ["unknown option 'ttl'"] = function() queue.stream { ttl = 5 } end,
      ["'overflow' must be \"drop%-head\" or \"reject%-publish\""] = function()
        queue.quorum { overflow = "reject-publish-dlx", max_length = 1 }
      end,
      ["'overflow' needs"] = function() queue.classic { overflow = "drop-head" } end,
      ["needs overflow = \"reject%-publish\""] = function()
        queue.quorum { dead_letter_strategy = "at-least-once", dead_letter_exchange = "d" }
      end,
      ["'dead_letter_strategy' needs"] = function()
        queue.quorum { dead_letter_strategy = "at-least-once", overflow = "reject-publish" }
      end,
      ["'dead_letter_routing_key' needs"] = function() queue.classic { dead_letter_routing_key = "k" } end,
      ["an integer from 1 to 255"] = function() queue.classic { max_priority = 256 } end,
    } do
      local ok, err = pcall(fn)
      assert.is_false(ok)
      assert.matches(pattern, err)
      assert.matches("queue_spec", err)
    end
  end)

  it("makes offsets of streams", function()
    local time = moonrabbit.types.timestamp(1700000000)
    for _, from in ipairs { "first", "last", "next", 0, 12345, "1h", "7D", time } do
      assert.same({ ["x-stream-offset"] = from }, queue.offset(from))
    end
    for _, bad in ipairs { "start", "", "1w", "h", -1, 1.5, true, {}, 0 / 0, moonrabbit.types.int64(5), print } do
      local ok, err = pcall(function() queue.offset(bad) end)
      assert.is_false(ok)
      assert.matches("queue_spec", err)
      assert.matches("expected", err)
    end
    assert.has_error(function() queue.offset() end)
  end)
end)
