local errors = require "moonrabbit.errors"

describe("errors", function()
  it("are tables that read as text", function()
    local err = errors.new { kind = "refused", message = "connection refused", endpoint = "h:5672" }
    assert.equal("connection refused [h:5672]", tostring(err))
    assert.equal("it failed: connection refused [h:5672]", "it failed: " .. err)
    assert.equal("connection refused [h:5672]!", err .. "!")
    assert.is_true(errors.is(err))
    assert.is_false(errors.is {})
    assert.is_false(errors.is "x")
  end)

  it("know whether trying again can help", function()
    for kind, expected in pairs { refused = true, timeout = true, closed = true, nacked = true, blocked = true,
      overflow = true, auth = false, vhost = false, tls = false, protocol = false, unroutable = false,
      shutdown = false, cancelled = false } do
      assert.equal(expected, errors.new({ kind = kind, message = "" }).temporary, kind)
    end
    assert.is_false(errors.new({ kind = "closed", message = "", temporary = false }).temporary)
  end)

  it("are made from what the engine reports", function()
    local err = errors.from_engine({ kind = "channel", code = 404, text = "NOT_FOUND - no queue 'x'", class = 50,
      method = 10 }, "h:1")
    assert.equal("channel", err.kind)
    assert.equal(404, err.code)
    assert.equal(50, err.class)
    assert.equal(10, err.method)
    assert.equal("NOT_FOUND - no queue 'x' (404, queue.declare)", err.message)
    assert.is_false(err.temporary)
    assert.is_true(errors.from_engine({ kind = "channel", code = 405, text = "RESOURCE_LOCKED" }).temporary)
    assert.is_true(errors.from_engine({ kind = "closed", code = 320, text = "CONNECTION_FORCED" }).temporary)
    assert.is_true(errors.from_engine({ kind = "protocol", code = 541, text = "INTERNAL_ERROR" }).temporary)
    assert.equal("overflow", errors.from_engine({ kind = "memory", text = "out of memory" }).kind)
    assert.equal("closed", errors.from_engine({ kind = "closed", text = "" }).message)
  end)

  it("name methods", function()
    assert.equal("basic.publish", errors.method_name(60, 40))
    assert.equal("basic.77", errors.method_name(60, 77))
    assert.is_nil(errors.method_name(99, 1))
    assert.is_nil(errors.method_name(nil, nil))
  end)
end)
