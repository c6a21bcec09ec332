local options = require "moonrabbit.options"

describe("options", function()
  local valid = {
    durable = options.boolean, prefetch = options.integer(0, 65535), queue = options.shortstr,
    timeout = options.seconds, handler = options.callback, mode = options.one_of("a", "b"),
    secret = options.either(options.string, options.callback),
  }

  local function complain(given)
    local function checked() options.check("f", given, valid) end
    local ok, message = pcall(function() checked() end)
    assert.is_false(ok)
    return message
  end

  it("takes what is valid", function()
    local given = { durable = true, prefetch = 10, queue = "q", timeout = 0.5, handler = print, mode = "a",
      secret = "x" }
    assert.equal(given, options.check("f", given, valid))
    options.check("f", { timeout = math.huge, prefetch = 5.0, secret = print }, valid)
    assert.same({}, options.check("f", nil, valid))
  end)

  it("names an unknown key and the nearest valid one", function()
    assert.matches("f: unknown option 'dureable' %(did you mean 'durable'%?%)", complain { dureable = true })
    assert.matches("did you mean 'timeout'", complain { timout = 1 })
    assert.matches("did you mean 'timeout'", complain { tiemout = 1 })
    assert.matches("did you mean 'queue'", complain { Queue = "x" })
    assert.matches("unknown option 'zzzzzz' %(valid: durable, handler, mode", complain { zzzzzz = 1 })
    assert.matches("unknown option 1", complain { "x" })
  end)

  it("names the option whose type is wrong, and not its value", function()
    assert.matches("option 'durable' must be a boolean, not a string", complain { durable = "yes" })
    assert.matches("option 'prefetch' must be an integer from 0 to 65535, not %-1", complain { prefetch = -1 })
    assert.matches("option 'prefetch' must be an integer from 0 to 65535, not 1.5", complain { prefetch = 1.5 })
    assert.matches("option 'prefetch' must be an integer", complain { prefetch = "1" })
    assert.matches("option 'timeout' must be a number of seconds", complain { timeout = -1 })
    assert.matches("option 'timeout' must be a number of seconds", complain { timeout = 0 / 0 })
    assert.matches("option 'queue' must be a string of at most 255 bytes", complain { queue = ("x"):rep(256) })
    assert.matches('option \'mode\' must be "a" or "b", not a string', complain { mode = "c" })
    assert.matches("option 'secret' must be a string or a function, not a table", complain { secret = {} })
    assert.matches("options must be a table, not a number", complain(5))
  end)

  it("blames the caller", function()
    local function api(opts) options.check("api", opts, valid) end
    local _, message = pcall(function() api { x = 1 } end)
    assert.matches("options_spec.lua:" .. (debug.getinfo(1, "l").currentline - 1), message)
  end)
end)
